"""Makes tests/golden/qwen3vl again: what Hugging Face's PyTorch Qwen3-VL gives for small random policies.

    python tests/golden/make_qwen3vl.py

Needs torch and transformers; the tests that read the files do not.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from test_policy_parity import CASES, accepted, as_torch, make_batch, make_model  # noqa: E402


def main() -> None:
    shutil.rmtree(HERE / "qwen3vl", ignore_errors=True)
    for case, sizes in CASES.items():
        model = make_model(**sizes)
        folder = HERE / "qwen3vl" / case
        model.save_pretrained(folder)
        ids, mask, grids = make_batch([(4, 6), (8, 2), (2, 6)], [3, 4, 5, 2, 6], [2, 1])
        width = model.config.vision_config.patch_size**2 * 6
        patches = np.random.default_rng(1).standard_normal((np.prod(grids, -1).sum(), width), np.float32)
        given = as_torch(ids, mask, grids)
        with torch.no_grad():
            pixels = torch.tensor(patches)
            positions, _ = model.model.get_rope_index(**accepted(model.model.get_rope_index, given))
            logits = model(pixel_values=pixels, **accepted(model.forward, given)).logits
            features = model.model.visual(pixels, grid_thw=given["image_grid_thw"])
        np.savez_compressed(
            folder / "expected.npz", ids=ids, mask=mask, grids=grids, patches=patches, positions=positions.numpy(),
            logits=logits.numpy(), vision=features.pooler_output.numpy(),
            deepstack=np.stack([x.numpy() for x in features.deepstack_features]),
            versions=np.array([torch.__version__, transformers.__version__]),
        )  # fmt: skip
        for extra in folder.glob("generation_config.json"):
            extra.unlink()


if __name__ == "__main__":
    main()
