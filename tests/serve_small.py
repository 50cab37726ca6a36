"""A small random Qwen3-VL behind `transformers serve`: `python tests/serve_small.py HF_HOME PORT`, for test_serve.py.

With a CPU build of torch, transformers' image code needs the operator schemas that torchvision could not register
(DESIGN.md section 7): they are declared before anything of transformers is imported. The model's parts are random,
but its layers add nothing to what its head reads, so that it says the same whatever it is asked: SAYS.
"""

import sys
from pathlib import Path

MODEL = "icseg/small-qwen3-vl"
SAYS = ["<answer>", "blue", "</answer>", "<|im_end|>"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>"]
TEMPLATE = """{%- for message in messages -%}<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == "image" -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def make(folder: Path) -> None:
    """Writes the model, its tokenizer and its processor as Hugging Face's hub cache keeps a downloaded model."""
    import tokenizers
    import torch
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    ids = {word: i for i, word in enumerate([*SPECIALS, "<unk>", "assistant", *SAYS[:-1]])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=SPECIALS[1:],
    )  # fmt: skip
    # 128 pixels are 4 x 4 merged tokens.
    pixels = {"size": {"shortest_edge": 32**2, "longest_edge": 128**2}, "patch_size": 16, "merge_size": 2}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**pixels), tokenizer, Qwen3VLVideoProcessor(**pixels), chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(ids), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True,
                             "mrope_section": [4, 2, 2]},
        ),
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32,
                           num_position_embeddings=16, deepstack_visual_indexes=[0], patch_size=16),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    ))  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        torch.nn.init.orthogonal_(embedding[: len(ids)])
        for now, following in zip(["assistant", *SAYS], SAYS, strict=False):
            head[ids[following]] = 10 * embedding[ids[now]]
    model.generation_config = GenerationConfig(eos_token_id=ids["<|im_end|>"], pad_token_id=0)
    cached = folder / "hub" / f"models--{MODEL.replace('/', '--')}"
    revision = "0" * 40
    model.save_pretrained(cached / "snapshots" / revision)
    processor.save_pretrained(cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)


if __name__ == "__main__":
    from icseg_jax.sam2_sidecar import import_torchvision

    import_torchvision()
    from transformers.models.auto import image_processing_auto

    # Nor can that torchvision decode a picture: Pillow does.
    image_processing_auto.DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS.append("Qwen2VLImageProcessor")
    home, port = Path(sys.argv[1]), sys.argv[2]
    if not home.exists():
        make(home)
    from transformers.cli.transformers import app

    app(["serve", MODEL, "--host", "127.0.0.1", "--port", port, "--device", "cpu"])
