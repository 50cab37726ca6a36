"""Runs experiment rows over seeds and puts them into one table.

`python -m icseg_jax.ablate experiments/ablations/levels/*.yaml seeds=0,1,2 [out=DIR] [key=value ...]`

Every row and seed is a run of `python -m icseg_jax.train` in its own process and directory, `OUT/<row>/seed<k>`, so the
same command goes on where it was stopped and repeats nothing. After each run `OUT/table.md`, `table.json` and
`table.png` are written anew: mean and standard deviation over the seeds that this command has finished, or found so.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from icseg_jax import train

USAGE = __doc__

# name in the evaluation, words in the table, +1: more is better, -1: less is better, 0: neither
COLUMNS = (
    ("success", "success", 1),
    ("success_ambiguous", "success, ambiguous", 1),
    ("success_clear", "success, clear", 1),
    ("jf", "J&F", 1),
    ("questions_ambiguous", "questions, ambiguous", 0),
    ("questions_clear", "questions, clear", -1),
    ("resolved_rate", "resolved", 1),
    ("redundant_question_rate", "redundant", -1),
    ("regret", "regret", -1),
    ("format_rate", "format", 1),
    ("reward", "reward", 1),
    *((f"terms/{term}", f"R {term}", 1) for term in train.TERMS),
)
DECODINGS = ("sampled", "greedy")


def parse(arguments: Sequence[str]) -> tuple[list[Path], list[int], Path | None, list[str]]:
    """Config files, seeds, output folder and overrides. Raises ConfigError for what can not be run."""
    configs, overrides = [Path(a) for a in arguments if "=" not in a], [a for a in arguments if "=" in a]
    options = dict(a.split("=", 1) for a in overrides if a.startswith(("seeds=", "out=")))
    overrides = [a for a in overrides if not a.startswith(("seeds=", "out="))]
    for key in ("seed", "run_dir", "name"):
        if any(a.startswith(f"{key}=") for a in overrides):
            raise train.ConfigError(f"{key}= is set for each run by ablate; use seeds=0,1,2 and out=DIR")
    try:
        seeds = [int(s) for s in options.get("seeds", "0").split(",")]
    except ValueError:
        raise train.ConfigError(f"seeds={options['seeds']}: give whole numbers, for example seeds=0,1,2") from None
    if not configs:
        raise train.ConfigError("no config given; rows are in experiments/ablations/, one folder per question")
    names = [c.stem for c in configs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if min(seeds) < 0:
        raise train.ConfigError(f"seeds={options['seeds']}: use numbers from 0 up")
    if twice or len(set(seeds)) < len(seeds):
        raise train.ConfigError(f"given twice: {', '.join(twice) or options['seeds']}; each row and seed runs once")
    for config in configs:  # all of them before anything runs
        train.load_config(config, overrides)
    return configs, seeds, Path(options["out"]) if "out" in options else None, overrides


def look_up(table: Any, name: str) -> float | None:
    for key in name.split("/"):
        table = table.get(key) if isinstance(table, dict) else None
    return float(table) if isinstance(table, (int, float)) else None


def seconds_per_step(run: Path) -> float | None:
    """Median over the run's steps; the first ones compile."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return statistics.median(sum(json.loads(line)["seconds"].values()) for line in lines)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def gather(out: Path, rows: Sequence[str], seeds: Sequence[int], ran: Collection[tuple[str, int]]) -> dict:
    """What the finished runs under `out` say: {row: {"seeds": [...], decoding: {metric: {mean, std, values}}}}.

    ran: (row, seed) that count; others may be of another config, which only their run itself can tell.
    """
    table: dict[str, dict] = {}
    for row in rows:
        done = []
        for seed in seeds:
            if (row, seed) not in ran:
                continue
            summary = train.read_json(out / row / f"seed{seed}" / "summary.json") or {}
            if summary.get("finished") and summary.get("after"):
                done.append((seed, summary))
        entry: dict[str, Any] = {"seeds": [seed for seed, _ in done]}
        speed = [s for seed, _ in done if (s := seconds_per_step(out / row / f"seed{seed}")) is not None]
        entry["seconds_per_step"] = statistics.mean(speed) if speed else None
        for decoding in DECODINGS:
            entry[decoding] = {}
            for name, *_ in COLUMNS:
                values = [look_up(s["after"].get(decoding, {}), name) for _, s in done]
                values = [v for v in values if v is not None]
                entry[decoding][name] = {
                    "mean": statistics.mean(values) if values else None,
                    "std": statistics.stdev(values) if len(values) > 1 else None,
                    "values": values,
                }
        table[row] = entry
    return table


def markdown(table: dict, planned: int) -> str:
    """One table per decoding, mean ± standard deviation over seeds."""
    lines = []
    for decoding in DECODINGS:
        lines += [f"## {decoding}", ""]
        titles = ["row", "seeds", *(title for _, title, _ in COLUMNS), "s/step"]
        lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        for row, entry in table.items():
            cells = [row, f"{len(entry['seeds'])} of {planned}"]
            for name, *_ in COLUMNS:
                cell = entry[decoding][name]
                spread = "" if cell["std"] is None else f" ± {cell['std']:.2f}"
                cells.append("" if cell["mean"] is None else f"{cell['mean']:.2f}{spread}")
            speed = entry["seconds_per_step"]
            lines.append("| " + " | ".join([*cells, "" if speed is None else f"{speed:.1f}"]) + " |")
        lines.append("")
    lines += ["`R process` and `reward` are in the terms that a row was trained with: rows that differ in them are not "
              "comparable there. `s/step` holds for the machine as it was then.", ""]
    return "\n".join(lines)


def draw(table: dict, path: Path) -> None:
    """A panel per metric, a bar per row, sampled and greedy side by side; error bars are deviations over seeds."""
    from matplotlib.figure import Figure

    from icseg_jax.report import LIGHT

    rows = [row for row, entry in table.items() if entry["seeds"]]
    if not rows:
        return
    across = 5
    down = -(-(len(COLUMNS) + 1) // across)
    figure = Figure(figsize=(3.1 * across + 0.9, (0.62 + 0.3 * len(rows)) * down + 0.4), layout="constrained")
    panels = figure.subplots(down, across, sharey=True).reshape(-1)
    for axes, (name, title, sense) in zip(panels, COLUMNS, strict=False):
        for i, (decoding, colour) in enumerate(zip(DECODINGS, (LIGHT.after, LIGHT.before), strict=True)):
            cells = [table[row][decoding][name] for row in rows]
            axes.barh(
                [y + 0.4 * i for y in range(len(rows))], [c["mean"] or 0 for c in cells], 0.36, color=colour,
                xerr=[c["std"] or 0 for c in cells], label=decoding, error_kw={"elinewidth": 1, "ecolor": LIGHT.ink},
            )  # fmt: skip
        axes.set_yticks([y + 0.2 for y in range(len(rows))], rows)
        axes.set_title(f"{title} {({1: '(more is better)', -1: '(less is better)'}).get(sense, '')}", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    axes = panels[len(COLUMNS)]
    axes.barh([y + 0.2 for y in range(len(rows))], [table[row]["seconds_per_step"] or 0 for row in rows], 0.6,
              color=LIGHT.muted)  # fmt: skip
    axes.set_title("seconds a step", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    for axes in panels[len(COLUMNS) + 1 :]:
        axes.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    part = path.with_name(f".{path.name}.part.png")
    figure.savefig(part, dpi=130)
    os.replace(part, path)


def write_tables(out: Path, rows: Sequence[str], seeds: Sequence[int], ran: Collection[tuple[str, int]]) -> dict:
    table = gather(out, rows, seeds, ran)
    train.write_atomically(out / "table.json", json.dumps(table, indent=1))
    train.write_atomically(out / "table.md", markdown(table, len(seeds)))
    draw(table, out / "table.png")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when all runs are finished or it was asked to stop, 1 when a run failed, 2 on bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0 if arguments else 2
    try:
        configs, seeds, out, overrides = parse(arguments)
    except train.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = out or Path("runs") / "ablations" / configs[0].resolve().parent.name
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: out={out}: {error.strerror}; choose a folder that can be written", file=sys.stderr)
        return 2
    rows = [c.stem for c in configs]
    plan = [(config, seed) for seed in seeds for config in configs]  # every row once before any row twice
    stopped: list[int] = []
    child: subprocess.Popen | None = None

    def stop(number: int, _: Any) -> None:
        stopped.append(number)
        if child is not None:  # it saves and leaves, at once where Ctrl-C says so again
            child.send_signal(signal.SIGTERM if len(stopped) == 1 else number)

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    failed, ran = [], set()
    begun = time.monotonic()
    try:
        for number, (config, seed) in enumerate(plan, start=1):
            if stopped:
                break
            run = out / config.stem / f"seed{seed}"
            spent = time.monotonic() - begun
            print(f"[{number}/{len(plan)}] {config.stem} seed {seed}   {spent / 60:.1f} minutes so far", flush=True)
            command = [sys.executable, "-m", "icseg_jax.train", str(config), *overrides]
            # A process group of its own: Ctrl-C reaches it once, through `stop`.
            # A finished run says so, and one of another config exits with 2.
            child = subprocess.Popen(
                [*command, f"run_dir={run}", f"seed={seed}", f"name={config.stem}-{seed}"], start_new_session=True
            )
            if stopped:  # the signal came between the two lines above
                child.send_signal(signal.SIGTERM)
            code = child.wait()
            child = None
            if code == 0:  # not what another command has left there
                ran.add((config.stem, seed))
            write_tables(out, rows, seeds, ran)
            if code and not stopped:
                failed.append(f"{config.stem} seed {seed} (exit code {code})")
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    table = write_tables(out, rows, seeds, ran)
    print(markdown(table, len(seeds)))
    print(f"{out}/table.md, table.json, table.png")
    if stopped:
        print("stopped; the same command goes on from there")
    for line in failed:
        print(f"failed: {line}; the same command tries it again", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
