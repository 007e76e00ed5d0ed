"""docs/benchmarks.md: the benchmarks, the parts of their JSON that are shown, and their goals."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import (
    experts,
    gradient_leakage,
    healing,
    healing_study,
    hostile,
    hostile_healing,
    leakage,
    llama_speed,
    llm_compressor,
    mixture,
    pack,
    quantize,
    renamed,
    secure,
    selection,
    solvers,
    structure,
    sweeps,
    text,
    votes,
    zero_shot,
)
from benchmarks._harness import shown
from benchmarks._plots import plots
from fedprllm.files import read_json, write_text
from fedprllm.report.drawing import standalone

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "benchmarks"

Json = Mapping[str, Any]
Tables = Mapping[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Goal:
    """A figure and its limit.

    Attributes:
        text: Description of the figure.
        figure: Extracts the figure from the benchmark's JSON.
        at_most: Upper limit, if that is the goal.
        at_least: Lower limit, if that is the goal.
    """

    text: str
    figure: Callable[[Json], float]
    at_most: float | None = None
    at_least: float | None = None

    def limit(self) -> str:
        word, limit = ("at most", self.at_most) if self.at_least is None else ("at least", self.at_least)
        return f"{word} {limit:g}"

    def is_met(self, figure: float) -> bool:
        return (self.at_most is None or figure <= self.at_most) and (
            self.at_least is None or figure >= self.at_least
        )


@dataclass(frozen=True)
class Benchmark:
    """A script in this folder and its section of the page.

    Attributes:
        title: Description of what it measures.
        command: Module and arguments.
        tables: Makes the section's tables, by heading, from the JSON.
        goals: Limits for its figures.
        by_hand: It needs something that is not installed with this project, so that `make bench` leaves it
            out.
    """

    title: str
    command: tuple[str, ...]
    tables: Callable[[Json], Tables]
    goals: tuple[Goal, ...] = ()
    by_hand: bool = False


def _figures(*names: str) -> Callable[[Json], Tables]:
    """Make a function that tabulates some figures of the JSON."""
    return lambda result: {"": [{"figure": name, "measured": result[name]} for name in names]}


def _contender(name: str, figure: str) -> Callable[[Json], float]:
    return lambda result: float(result["adding"]["contenders"][name][figure])


def _fastest_of_torch(result: Json) -> float:
    """Time of torch's fastest selection relative to ours, at the 7B shape where it comes closest.

    numpy.partition does not compete: it is the first step of ours, and alone it prunes too much at ties.
    """
    return min(
        row["times_ours"]
        for shape in result["shapes"]
        for name, row in shape["contenders"].items()
        if name.startswith("torch.") and max(shape["shape"]) >= 4096
    )


def _slowest_mask(result: Json) -> float:
    """Time per mask: ratio of slowest to fastest over all numbers of participants."""
    ms = [row["ms_per_mask"] for row in result["participants"]]
    return float(max(ms) / min(ms))


def _spare_bits(result: Json) -> float:
    """Growth in bits per weight with the number of participants, beyond that of ceil(log2(m + 1))."""
    rows = sorted(result["participants"], key=lambda row: row["n_participants"])
    beyond = [row["votes_bits_per_weight"] - row["n_participants"].bit_length() for row in rows]
    return float(beyond[-1] - beyond[0])


def _of_theirs(figure: str, *dtypes: str) -> Callable[[Json], float]:
    """Our figure relative to llm-compressor's, in the precision where the ratio is largest."""
    return lambda result: max(result["smollm2"][dtype]["ours_of_theirs"][figure] for dtype in dtypes)


def _straightness(sweep: str) -> Goal:
    return Goal(
        f"cost against {sweep}: r² of a straight line", lambda r: r["sweeps"][sweep]["r2"], at_least=0.99
    )


def _large(result: Json) -> Tables:
    """Tabulate runs with the large shapes, and the extrapolation from two blocks to a 70B model."""
    larger = result.get("llama-70b", {"measured": {}, "extrapolated": {}})
    runs = {"LLaMA-7B": _7b(result)} | {f"LLaMA-70B, {n} of 80": run for n, run in larger["measured"].items()}
    figures = ("wall_s", "forward_s", "yardstick_s", "ratio", "peak_resident_gib", "peak_anonymous_gib")
    rows = [
        {"shape": shape, "blocks": run["blocks"], "shares": share}
        | {figure: run[share][figure] for figure in (*figures, "exact_sparsity")}
        for shape, run in runs.items()
        for share in ("mask", "statistics")
    ]
    tables = {f"{result['participants']} participants, one window of {result['length']} tokens each": rows}
    if larger["extrapolated"]:
        tables["LLaMA-70B, extrapolated to all blocks"] = [larger["extrapolated"]]
    return tables


def _7b(result: Json) -> Json:
    found: Json = result["llama-7b"] if "llama-7b" in result else result["tiny"]
    return found


def _worse_share(figure: str) -> Callable[[Json], float]:
    """Make a function that returns a figure of the large model, the larger of masks and statistics."""
    return lambda result: max(_7b(result)[share][figure] for share in ("mask", "statistics"))


_FEDERATION = _figures(
    "same_bits",
    "payload_bytes",
    "update_overhead_percent",
    "wire_overhead_percent",
    "in_process_s_per_block",
    "in_process_one_thread_s_per_block",
    "federated_s_per_block",
    "until_first_update_s",
    "peak_resident_mb",
    "peak_anonymous_mb",
)
_ONE_SHOT = _figures("forward_s", "federation_s", "ratio", "phases_s")

BENCHMARKS: dict[str, Benchmark] = {
    "one-shot-2048": Benchmark(
        "One-shot federation of SmolLM2-135M, 2 participants with 2 windows of 2048 tokens, float32, against "
        "its bare forward passes",
        ("benchmarks.one_shot", "--participants", "2", "--length", "2048", "--repeats", "1"),
        _ONE_SHOT,
        (Goal("one-shot federation / its bare forward passes, 2048 tokens", lambda r: r["ratio"], 1.3),),
    ),
    "one-shot-512": Benchmark(
        "The same with 4 participants and 2 windows of 512 tokens",
        ("benchmarks.one_shot", "--participants", "4", "--length", "512", "--repeats", "2"),
        _ONE_SHOT,
        (Goal("the same, 512 tokens", lambda r: r["ratio"], 2.0),),
    ),
    "llm-compressor": Benchmark(
        "Centralized Wanda against llm-compressor's WandaPruningModifier",
        ("benchmarks.llm_compressor", "--repeats", "2"),
        llm_compressor.tables,
        (
            Goal("time of the process / llm-compressor's, float32", _of_theirs("process_s", "float32"), 0.75),
            Goal("the same, bfloat16", _of_theirs("process_s", "bfloat16"), 0.4),
            Goal(
                "peak resident memory / llm-compressor's, the worse precision",
                _of_theirs("peak_resident_mb", "float32", "bfloat16"),
                0.5,
            ),
            Goal(
                "peak anonymous memory / llm-compressor's, the worse precision",
                _of_theirs("peak_anonymous_mb", "float32", "bfloat16"),
                0.5,
            ),
        ),
    ),
    "selection": Benchmark(
        "Selection of the k lowest per row against sort, top-k, k-th value and partition",
        ("benchmarks.selection",),
        selection.tables,
        (
            Goal(
                "fastest of torch's selections / ours, 7B shape where it is nearest",
                _fastest_of_torch,
                at_least=1,
            ),
        ),
    ),
    "votes": Benchmark(
        "Votes in bit planes: adding masks, 1,000 participants, packing, the most voted",
        ("benchmarks.votes",),
        votes.tables,
        (
            Goal(
                "unpack-and-add (int16) / planes, seconds",
                _contender("unpack and add, int16", "times_planes"),
                at_least=5.0,
            ),
            Goal("time of a mask, slowest / fastest of 125 to 1,000 participants", _slowest_mask, 1.25),
            Goal(
                "growth from 125 to 1,000 participants beyond ceil(log2(m + 1)), bits per weight",
                _spare_bits,
                0.25,  # measured for the process, whose allocator adds a little
            ),
        ),
    ),
    "sweeps": Benchmark(
        "Cost of a one-shot federation of SmolLM2-135M against its windows, its participants and its blocks",
        ("benchmarks.sweeps",),
        sweeps.tables,
        tuple(_straightness(sweep) for sweep in ("windows", "participants", "blocks")),
    ),
    "large": Benchmark(
        "A model larger than memory: checkpoints of the shapes of LLaMA-7B and LLaMA-70B",
        ("benchmarks.large",),
        _large,
        (
            Goal("peak resident memory at LLaMA-7B's shape, GiB", _worse_share("peak_resident_gib"), 4.0),
            Goal("its time / bare forward passes and reading and writing once", _worse_share("ratio"), 1.5),
        ),
    ),
    "memory": Benchmark(
        "Peak memory of the process against the number of participants (1 window of 512 tokens each)",
        ("benchmarks.memory",),
        _figures("peak_mb_by_participants", "block_mb", "model_mb"),
    ),
    "statistics-exact": Benchmark(
        "Weights of SmolLM2-135M that shared sums treat otherwise than pooled text: 4 participants, 2 "
        "windows of 256 tokens each",
        ("benchmarks.statistics_exact",),
        _figures("n_prunable", "differing", "differing_per_million", "close"),
        (Goal("weights treated otherwise, per million", lambda r: r["differing_per_million"], 1.0),),
    ),
    "federation": Benchmark(
        "A federated run on one machine's loopback against the same run in one process: SmolLM2-135M, masks, "
        "4 participants with 2 windows of 256 tokens",
        ("benchmarks.federation",),
        _FEDERATION,
    ),
    "federation-large": Benchmark(
        "The same with updates of 238 MB (weights and masks of two wide random blocks), 2 and 4 participants",
        ("benchmarks.federation", "--large-updates"),
        _FEDERATION,
    ),
    "hostile": Benchmark(
        "One hostile participant of 4 and of 16, for every way of sharing: perplexity of the honest and the "
        "attacked model, or refused and named; under masks, the run can only be ended (16 windows of 128 "
        "tokens each, the small model of the tests)",
        ("benchmarks.hostile",),
        hostile.tables,
        (
            Goal(
                "largest rise in perplexity by one of 4 participants: masks, weights, outliers, trimmed, %",
                lambda r: r["worst_percent_robust"],
                5.0,
            ),
            Goal("the same with sums and Gram matrices, %", lambda r: r["worst_percent"], 5.0),
            Goal("the same under masks (secure), %", lambda r: r["worst_percent_masked"], 5.0),
        ),
    ),
    "secure": Benchmark(
        "Secure aggregation: its own steps for 4 to 64 participants, and whole runs under masks beside the "
        "same in the clear (processor seconds, because the machine was busy)",
        ("benchmarks.secure",),
        secure.tables,
        (
            Goal("time of a run under masks / in the clear, 4 participants, loopback", secure.overhead, 1.15),
            Goal(
                "server's memory to add up and unmask / one block and one masked update, LLaMA-7B",
                secure.server_memory,
                1.0,
            ),
        ),
    ),
    "leakage": Benchmark(
        "What an update tells: the norms behind a mask, and whether a window of 128 tokens is among the text "
        "(SmolLM2-135M, updates of 3 of 30 blocks)",
        ("benchmarks.leakage",),
        leakage.tables,
    ),
    "renamed": Benchmark(
        "One block in memory where transformers renames tensors: GPT-NeoX beside a Llama of the same size",
        ("benchmarks.renamed",),
        lambda r: {"": r["rows"]},
        (Goal("peak anonymous memory of GPT-NeoX / the Llama's", renamed.ratio, 1.05),),
    ),
    "experts": Benchmark(
        "One block in memory with experts: two blocks of the shape of Mixtral-8x7B, masks of 2 participants",
        ("benchmarks.experts",),
        experts.tables,
        tuple(
            Goal(
                f"peak memory beyond a block of Mixtral-8x7B, GiB, experts stored {form}",
                partial(experts.beyond_a_block, form=form),
                1.5,
            )
            for form in ("one by one", "fused")
        ),
    ),
    "mixture": Benchmark(
        "A trained mixture (16 experts, 2 for each token) pruned by half by three participants with one kind "
        "of text each: loss on held-out text, nats per token",
        ("benchmarks.mixture",),
        mixture.tables,
        (
            Goal(
                "loss of the mixture pruned together / with all text in one place",
                lambda r: mixture.loss(r, "together, one-shot") / mixture.loss(r, "all text in one place"),
                1.017,
            ),
            Goal(
                "its increase by magnitude / together",
                lambda r: r["increase"]["magnitude"] / r["increase"]["together, one-shot"],
                at_least=1.4,
            ),
        ),
    ),
    "mixture-experts": Benchmark(
        "The same mixture without half of its experts: removed together, by each alone, by chance",
        ("benchmarks.mixture", "--experts", "8"),
        mixture.tables,
        (
            Goal(
                "largest increase of the loss on one kind of text, experts removed together / alone",
                lambda r: mixture.worst_increase(r, "together") / mixture.worst_increase(r, "alone"),
                1,
            ),
        ),
    ),
    "solvers": Benchmark(
        "What sums can do better than votes: SmolLM2-135M at 50 %, 16 windows of 512 tokens per participant",
        ("benchmarks.solvers",),
        solvers.tables,
        (
            Goal("damage with admm / damage by votes", lambda r: solvers.damage(r, "gram, admm"), 0.5),
            Goal("damage with alps / damage by votes", lambda r: solvers.damage(r, "gram, alps"), 0.5),
            Goal(
                "admm's time in the server / SparseGPT's", lambda r: solvers.server_time(r, "gram, admm"), 4
            ),
        ),
    ),
    "structure": Benchmark(
        "Smaller dense models: SmolLM2-135M without a tenth and a fifth of its block parameters",
        ("benchmarks.structure", "--repeats", "0"),
        structure.tables,
        (
            Goal(
                "perplexity minus dense, MLPs, a tenth fewer block parameters",
                lambda r: structure.damage(r, "mlp=0.125"),
                2.96,
            ),
            Goal("the same, a fifth fewer", lambda r: structure.damage(r, "mlp=0.27"), 7.67),
        ),
    ),
    "structure-alone": Benchmark(
        "Smaller models made together, and by each participant alone, on its own and on the others' text",
        ("benchmarks.structure", "--structures", "mlp=0.27", "--windows", "8", "--alone", "--repeats", "0"),
        structure.tables,
    ),
    "structure-chosen": Benchmark(
        "Smaller models whose structure is chosen: what every candidate costs, a tenth and a fifth smaller",
        ("benchmarks.structure", "--structures", "--smaller", "0.1", "0.2", "--repeats", "0"),
        structure.tables,
        (Goal("perplexity of the chosen structure / of the best candidate", structure.regret, 1.0),),
    ),
    "structure-speed": Benchmark(
        "Speed of smaller models in transformers",
        ("benchmarks.structure", "--speed-only"),
        structure.tables,
        (
            Goal("time of a prompt, a fifth smaller / dense", lambda r: structure.time(r, "prefill"), 0.87),
            Goal("time of a token, a fifth smaller / dense", lambda r: structure.time(r, "decode"), 0.87),
        ),
    ),
    "healing": Benchmark(
        "Healing together: SmolLM2-135M after pruning, and one round at LLaMA-7B's width",
        ("benchmarks.healing",),
        healing.tables,
        (
            Goal(
                "damage at 50 %, healed / damage of votes",
                lambda r: healing.damage(r, "gram with admm, 50 %"),
                0.25,
            ),
            Goal("the same, a fifth smaller", lambda r: healing.damage(r, "mlp=0.27"), 0.25),
            Goal(
                "CPU time of a round / of its forward passes", lambda r: r["round"][0]["round / forward"], 4.5
            ),
            Goal("peak memory of a round, GiB", lambda r: r["round"][0]["peak_anonymous_gib"], 4),
        ),
    ),
    "healing_study": Benchmark(
        "Healing alone or together, on private or public text: SmolLM2-135M",
        ("benchmarks.healing_study", "--texts", "FOLDER", "--public", "FILE", "--nobody", "FILE"),
        healing_study.tables,
        (
            Goal(
                "damage of votes after 20 rounds / before",
                lambda r: healing_study.damage(r, "votes, 50 %"),
                0.25,
            ),
            Goal(
                "damage of a fifth smaller after 20 rounds / of votes before",
                lambda r: healing_study.damage(r, "mlp=0.27"),
                0.25,
            ),
        ),
        by_hand=True,
    ),
    "healing_study_others": Benchmark(
        "The same at 60 %, 6:8 and 30 % smaller",
        ("benchmarks.healing_study", "--texts", "FOLDER", "--public", "FILE", "--nobody", "FILE"),
        healing_study.tables,
        by_hand=True,
    ),
    "zero_shot": Benchmark(
        "Zero-shot tasks before and after pruning and healing: SmolLM2-135M",
        ("benchmarks.zero_shot", "--bigbench", "FOLDER", "--models", "NAME=FOLDER"),
        zero_shot.tables,
        by_hand=True,
    ),
    "hostile_healing": Benchmark(
        "One hostile participant in a healing, the small model of the tests",
        ("benchmarks.hostile_healing",),
        hostile_healing.tables,
        (
            Goal(
                "perplexity under attack / honest, each gradient seen",
                lambda r: hostile_healing.worst(r, "each gradient"),
                1.05,
            ),
            Goal("the same where only sums are seen", lambda r: hostile_healing.worst(r, "sums"), 1.05),
        ),
    ),
    "gradient_leakage": Benchmark(
        "What a round of healing tells about a text, SmolLM2-135M",
        ("benchmarks.gradient_leakage",),
        gradient_leakage.tables,
    ),
    "llama-speed": Benchmark(
        "Speed of smaller models in llama.cpp",
        ("benchmarks.llama_speed", "--tools", "FOLDER"),
        llama_speed.tables,
        (
            Goal("the same in llama.cpp: time of a prompt", lambda r: llama_speed.time(r, "prefill"), 0.87),
            Goal("time of a token", lambda r: llama_speed.time(r, "decode"), 0.87),
        ),
        by_hand=True,
    ),
    "pack": Benchmark(
        "A packed model and a participant's download: SmolLM2-135M in bfloat16",
        ("benchmarks.pack",),
        pack.tables,
        (
            Goal(
                "packed model, half of the weights zero / dense file",
                lambda r: pack.ratio(r, "packed / dense file"),
                0.41,
            ),
            Goal(
                "the same, matrices of the blocks alone",
                lambda r: pack.ratio(r, "the blocks' matrices alone"),
                0.41,
            ),
        ),
    ),
    "quantize": Benchmark(
        "Quantized together: SmolLM2-135M by llama.cpp with an importance matrix of the participants' sums",
        ("benchmarks.quantize", "--tools", "FOLDER"),
        quantize.tables,
        by_hand=True,
    ),
    "text": Benchmark(
        "Reading text: 2 calibration windows of 64 tokens, or 256 tokens to evaluate on, from files of 5 MB "
        "to 1 GB",
        ("benchmarks.text",),
        text.tables,
        (
            Goal("seconds for a text of 51 MB, slowest format", lambda r: text.worst(r, "seconds"), 5.0),
            Goal("peak memory of the process, MB, largest format", lambda r: text.worst(r, "peak_mb"), 1000),
            Goal("the same for a text of 1 GB", lambda r: text.worst(r, "peak_mb", 1000), 1000),
        ),
    ),
}


def write_page() -> None:
    """Write docs/benchmarks.md from the JSON of the last runs and the handwritten notes."""
    results = {name: read_json(RESULTS / f"{name}.json") for name in BENCHMARKS if _file(name).exists()}
    notes = RESULTS / "notes.md"
    parts = [
        "# Benchmarks",
        "Written by `make bench`; each section by the command it names. Ratios are measured side by side in "
        "one run; the JSON behind them is in [benchmarks/](benchmarks/).",
        "## Goals",
        _summary(results),
        *(_section(name, results[name]) for name in BENCHMARKS if name in results),
        *([notes.read_text(encoding="utf-8").strip()] if notes.exists() else []),
    ]
    write_text(ROOT / "docs" / "benchmarks.md", "\n\n".join(parts) + "\n")


def _file(name: str) -> Path:
    return RESULTS / f"{name}.json"


def _summary(results: Mapping[str, Json]) -> str:
    """Tabulate every goal with its measured figure."""
    rows = []
    for name, benchmark in BENCHMARKS.items():
        for goal in benchmark.goals:
            row = {"goal": goal.text, "limit": goal.limit(), "measured": "", "met": "not measured"}
            if name in results and "failed" in results[name]:
                row["met"] = "failed"
            elif name in results:
                figure = goal.figure(results[name])
                if math.isnan(figure):  # the run left this part out
                    rows.append(row)
                    continue
                row |= {"measured": shown(figure), "met": "yes" if goal.is_met(figure) else "**no**"}
            rows.append(row)
    return _table(rows)


def _section(name: str, result: Json) -> str:
    benchmark = BENCHMARKS[name]
    module, *options = benchmark.command
    words = shlex.join([module, *result.get("options", options)])
    parts = [f"## {benchmark.title}", f"`python -m {words}`"]
    if "failed" in result:
        return "\n\n".join([*parts, f"**Failed** when it was run last: {result['failed']}"])
    if result.get("quick"):
        parts.append("**Small sizes: this shows that it runs, not how fast.**")
    for heading, rows in benchmark.tables(result).items():
        parts += [*([f"### {heading}"] if heading else []), _table(rows)]
    for number, (label, svg) in enumerate(plots(name, result).items(), 1):
        file = f"{name}-{number}.svg"
        write_text(RESULTS / file, standalone(svg))
        parts.append(f"![{label}](benchmarks/{file})")
    return "\n\n".join([*parts, _about(result)])


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0])
    lines = [columns, [":---", *["---:"] * (len(columns) - 1)]]
    lines += [[shown(row[column]) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _about(result: Json) -> str:
    """Describe the machine and the versions of a measurement."""
    machine = result["machine"]
    took = f" Took {result['took_s']:,.0f} s." if "took_s" in result else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB, load before {machine['load_before']}; "
        f"Python {machine['python']}, torch {machine['torch']}, numpy {machine['numpy']}; "
        f"commit {machine['commit']}.{took}"
    )
