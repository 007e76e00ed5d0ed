"""The report: it states what the record states, and the page is self-contained."""

from __future__ import annotations

import math
import re
import shutil
from importlib.resources import files

import matplotlib
import numpy as np
import pytest
import torch

from fedprllm import PruneConfig, RunError, prune
from fedprllm.pruning import agreement
from fedprllm.report.agreement import SAMPLE, mean_agreement
from fedprllm.report.page import write_report
from tests.report_pages import (
    LINKS,
    measured,
    report,
    result_of,
    windows_of,
)

# Content ----------------------------------------------------------------------------------


def test_page_holds_the_figures_of_the_record(run_once, edited):
    def evaluate(result):
        result["evaluation"] = {
            "dense": measured(notes=10.0, letters=40.0),
            "model": measured(notes=12.5, letters=48.0),
        }

    run = edited(run_once(), evaluate)
    page, result = report(run), result_of(run)
    configuration = {row[0]: row[1:] for row in page.tables["All options"]}
    words = {"True": "yes", "False": "no", "None": "not set", "[]": "none"}
    for name, value in result["config"].items():
        shown, meaning = configuration[name.replace("_", "-")]
        assert meaning == PruneConfig.model_fields[name].description
        assert shown == words.get(str(value), str(value))
    per_block = result["update_bytes_per_block"]
    assert page.tables["Participants and their calibration text"][1:] == [
        [f"site-{number}", "2", "16", "32", "3 of 3", f"{sum(per_block):,}"] for number in range(3)
    ]
    assert ["torch", result["versions"]["torch"]] in page.tables["Model and versions"]
    assert result["model"]["fingerprint"] in page.text
    assert page.tables["Perplexity by text"] == [
        ["text", "dense", "pruned together"],
        ["notes", "10.00", "12.50 +25.0 %"],
        ["letters", "40.00", "48.00 +20.0 %"],
    ]
    assert "10.00 → 24.49" not in page.text
    assert "20.00 → 24.49 +22.5 %, geometric mean over 2 texts" in page.text
    assert page.left["per block"] == f"{per_block[0]:,} bytes"
    assert page.left["in total"] == f"{sum(per_block):,} bytes ({sum(per_block) / 1000:.1f} kB)"
    assert page.left["rounds"].startswith("1: ")


def test_the_answers_come_first_then_the_evidence_then_the_settings(run_once):
    page = report(run_once())
    assert page.headings == [
        "What you got",
        "Did it pay off?",
        "What would leave each participant",
        "What to be careful about",
        "Evidence",
        "How it was made",
    ]
    assert re.findall(r"<h3[^>]*>([^<]*)</h3>", page.html) == [
        "Sparsity",
        "How much the participants agree",
        "Prunes decided by a tie",
        "Time",
        "Settings",
    ]
    folded = re.findall(r"<details>(.*?)</details>", page.html, flags=re.DOTALL)
    assert any("All options" in part for part in folded)
    assert any("Model and versions" in part for part in folded)
    changed = report(run_once(sparsity=0.25)).tables["Options that are not at their default"]
    assert [row[:2] for row in changed[1:]] == [["sparsity", "0.25 default: 0.5"], ["window-length", "16"]]


def test_sparsity_ties_and_seconds_are_sums_over_blocks(run_once):
    run = run_once()
    page, blocks = report(run), result_of(run)["blocks"]
    linears = [linear for record in blocks for linear in record["linears"].values()]
    n_zeros = sum(linear["n_zeros"] for linear in linears)
    n_weights = sum(math.prod(linear["shape"]) for linear in linears)
    assert f"Pruned to {n_zeros / n_weights * 100:.1f} % zeros by 3 participants, one-shot." in page.text
    assert (
        "Uniform: every Linear of every block has 50.0 % zeros, including those of the dense model."
        in page.text
    )
    rows = page.tables["The server's decision"]
    for path, n_pruned, n_ties, share in rows[1:]:
        chosen = [linear for linear in linears if path in (linear["kind"], "all Linears")]
        prunes, tied = (sum(linear[key] for linear in chosen) for key in ("n_pruned", "n_ties"))
        assert (n_pruned, n_ties, share) == (f"{prunes:,}", f"{tied:,}", f"{tied / prunes * 100:.1f} %")
    assert len(rows) == 1 + 7 + 1
    observed = sum(record["seconds"]["observe"] for record in blocks)
    shown = f"{observed:.1f} s" if observed >= 1 else f"{observed:.2f} s"
    labels = " ".join(" ".join(tag[1].get("aria-label", "") for tag in page.tags).split())
    assert f"observe {shown}" in labels


def test_agreement_is_the_mean_weighted_by_weights(run_once):
    run = run_once(3, sparsity=0.25)
    page, blocks = report(run), result_of(run)["blocks"]
    total, n_weights, alike = np.zeros((3, 3)), 0, 0
    for record in blocks:
        for linear in record["linears"].values():
            size = math.prod(linear["shape"])
            total += size * np.array(record["agreement"][linear["kind"]])
            n_weights += size
            alike += linear["vote_histogram"][0] + linear["vote_histogram"][3]
    matrix = total / n_weights
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert page.html.count(f">{matrix[a, b]:.3f}</text>") >= 2
    mean = (matrix.sum() - 3) / 6
    assert f"On average, two participants agree on {mean * 100:.1f} % of the weights; site-" in page.text
    assert f"the participants disagree on the other {(1 - alike / n_weights) * 100:.1f} %" in page.text
    # s = 1/4: 1/16 + 9/16; all or none of three: 1/64 + 27/64.
    assert "sparsity s = 0.25 agree on s² + (1 - s)² = 0.625" in page.text
    assert "(56.2 % if masks were random)" in page.text
    assert "estimated from a sample of 16,384 weights per Linear" in page.text
    assert agreement._SAMPLE == SAMPLE == 16_384


@pytest.mark.parametrize("m", [2, 3, 7])
def test_the_mean_agreement_of_pairs_follows_from_the_votes(m):
    masks = torch.rand((m, 500), generator=torch.Generator().manual_seed(m)) < 0.3
    pairs = [(masks[a] == masks[b]).double().mean() for a in range(m) for b in range(a)]
    histogram = masks.sum(dim=0).bincount(minlength=m + 1).tolist()
    assert mean_agreement([histogram]) == pytest.approx(float(sum(pairs)) / len(pairs))


def test_under_masks_only_the_mean_agreement_is_known(run_once):
    """Of three masks, all three pairs are alike with 0 or 3 votes, and one pair otherwise."""
    run = run_once(3, secure=True)
    page = report(run)
    votes = sum(
        np.array(one["vote_histogram"]) for r in result_of(run)["blocks"] for one in r["linears"].values()
    )
    mean = (votes[0] + votes[3] + (votes[1] + votes[2]) / 3) / votes.sum()
    assert f"On average, two participants agree on {mean * 100:.1f} % of the weights. Updates" in page.text
    assert "Pairwise agreement" not in page.html
    weighted = report(run_once(3, secure=True, weighting="tokens", windows=2))
    assert "Omitted: votes were weighted by tokens under masks" in weighted.text


def test_participants_own_ties(run_once, edited):
    def tie(result):
        for record in result["blocks"]:
            record["participant_ties"]["site-1"] = 7

    page = report(edited(run_once(), tie))
    own = page.tables["The participants' own masks"]
    assert [row[:2] for row in own[1:]] == [["site-0", "0"], ["site-1", "21"], ["site-2", "0"]]


def test_sparsity_that_differs_is_said_and_notes_are_listed(run_once, edited):
    def differ(result):
        first = next(iter(result["blocks"][1]["linears"].values()))
        first["n_zeros"] = first["shape"][0] * first["shape"][1] * 3 // 4
        result["blocks"][1]["notes"] = ["damping raised to 0.1"]

    page = report(edited(run_once(), differ))
    assert "The Linears have between 50.0 % and 75.0 % zeros, including" in page.text
    assert "<li>Damping raised to 0.1.</li>" in page.html
    assert page.tables["Share of zeros"][0] == ["type of Linear", "block 0", "block 1", "block 2"]
    assert page.tables["Share of zeros"][1][1:] == ["50.0 %", "75.0 %", "50.0 %"]


# Omissions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "options", "said", "absent"),
    [
        (3, {}, "Not measured: the run had no evaluation text.", "Perplexity by text"),
        (1, {}, "Omitted: there is only one participant", "votes to prune"),
        (3, {"strategy": "centralized"}, "Omitted: all text was pooled", "The server's decision"),
        (3, {"strategy": "centralized"}, "No updates: the text itself was pooled,", "would send 0"),
        (
            3,
            {"strategy": "local-only"},
            "No updates: each participant pruned alone.",
            "The server's decision",
        ),
        (3, {"strategy": "local-only"}, "This run held no vote", "Each participant would send"),
        (3, {"strategy": "iterative"}, "3: after each block the server returns", "Omitted"),
        (3, {"criterion": "magnitude"}, "All masks are identical", "Pairwise agreement of the masks:"),
        (3, {"share": "statistics"}, "make no masks of their own", "votes to prune"),
        (
            3,
            {"weighting": "tokens"},
            "There is no histogram of votes",
            "votes to prune",
        ),
    ],
)
def test_what_does_not_apply_is_left_out(run_once, n, options, said, absent):
    page = report(run_once(n, **options))
    assert said in page.text
    assert absent not in page.html


def test_two_participants_have_one_pair(run_once):
    page = report(run_once(2))
    assert re.search(r"On average, two participants agree on [\d.]+ % of the weights\. ", page.text)


def test_experts_have_a_row_for_all_of_them(run_once):
    run = run_once(2, "qwen3-moe")
    page = report(run)
    assert "mlp.experts.*.down_proj" in page.html
    assert not re.search(r"experts\.\d", page.html)
    linears = [one for block in result_of(run)["blocks"] for one in block["linears"].values()]
    n_pruned = sum(one["n_pruned"] for one in linears if one["kind"].endswith(".down_proj"))
    assert f"{n_pruned:,}" in page.html
    assert "The text of " in page.html, "how far each text reached"


def test_gpt2_and_patterns(run_once):
    page = report(run_once(2, "gpt2", pattern="2:4"))
    assert "attn.c_attn" in page.text
    assert "The files are as large as those of the dense model, and it is as fast" in page.text
    assert "try 6:8 before 2:4" in page.text
    assert "try 6:8 before 2:4" not in report(run_once(2, "gpt2", pattern="3:4")).text


# Other models ----------------------------------------------------------------------------------


def test_comparison_has_its_own_table(run_once, edited):
    def compare(result):
        result["comparison"] = {
            "dense": measured(a=10.0, b=20.0),
            "local-only: north": measured(a=15.0, b=40.0),
            "local-only: south": measured(a=math.inf, b=200.0),
            "federated": measured(a=12.0, b=24.0),
        }

    page = report(edited(run_once(), compare))
    assert page.tables["Perplexity by model and text"] == [
        ["model", "a", "b"],
        ["dense", "10.00", "20.00"],
        ["local-only: north", "15.00 +50.0 %", "40.00 +100.0 %"],
        ["local-only: south", "∞", "200.00 10 times"],
        ["federated", "12.00 +20.0 %", "24.00 +20.0 %"],
    ]
    # The head quotes the comparison when the run itself measured nothing.
    assert "14.14 → 16.97 +20.0 %" in page.text


def test_many_models_are_summed_up_in_the_figure_only(run_once, edited):
    def evaluate(result):
        result["config"]["strategy"] = "local-only"
        result["models"] = {f"m{number}": f"participants/m{number}/model" for number in range(30)}
        result["evaluation"] = {"dense": measured(a=10.0)} | {
            name: measured(a=20.0 + number) for number, name in enumerate(result["models"])
        }

    page = report(edited(run_once(), evaluate))
    assert len(page.tables["Perplexity by model and text"]) == 1 + 31
    labels = " ".join(attributes["aria-label"] for tag, attributes in page.tags if tag == "svg")
    assert "dense 10.00, local-only, lowest of 30 20.00, local-only, highest of 30 49.00" in labels
    assert "10.00 → 20.00 to 49.00 on a" in page.text
    assert "perplexities 2.0 to 4.9 times the dense model's." in page.text


# The page itself -------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "n_windows"), [(3, 2), (64, 1)])
def test_page_needs_nothing_but_itself(run_once, n, n_windows):
    page = report(run_once(n, n_windows=n_windows))
    assert len(page.html) < 3_000_000
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "img", "base"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in LINKS & attributes.keys():
            assert attributes[name].startswith(("#", "data:image/png;base64,")), attributes[name]
    for forbidden in ("http:", "https:", "//www", "@import", "javascript:"):
        assert forbidden not in page.html.replace("data:image/png;base64,", ""), forbidden
    assert not re.search(r"url\((?!#)", page.html)


def test_page_is_accessible(run_once):
    page = report(run_once())
    names = [tag for tag, _ in page.tags]
    figures = [attributes for tag, attributes in page.tags if tag == "svg"]
    n_figures = names.count("figure")
    assert n_figures == 4
    assert len(figures) == 2 * n_figures, "each is drawn for wide and for narrow pages"
    assert page.html.count("The numbers of this figure") == n_figures - 1, "the time is in the figure's text"
    assert all(figure["role"] == "img" and len(figure["aria-label"]) > 40 for figure in figures)
    assert all(attributes["scope"] in ("row", "col") for tag, attributes in page.tags if tag == "th")
    assert names.count("table") == names.count("caption") > 0
    assert names.count("h1") == 1
    assert names.count("figcaption") == n_figures
    assert dict(page.tags)["html"]["lang"] == "en"
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [attributes["href"][1:] for tag, attributes in page.tags if tag == "a"]
    assert set(targets) <= set(ids)
    assert "$" not in page.text
    assert "prefers-color-scheme: dark" in page.html
    assert "@media print" in page.html
    assert not re.search(r"#0a0[bc]\d\d", page.html), "a placeholder color was left"


def _luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_colors_have_contrast_in_light_and_dark():
    """WCAG 2.1 contrast ratios: 4.5 for text, 3 for graphics."""
    css = files("fedprllm.report").joinpath("style.css").read_text(encoding="utf-8")
    schemes = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme))

        def contrast(one: str, other: str, colors: dict[str, str] = colors) -> float:
            dark, light = sorted((_luminance(colors[one]), _luminance(colors[other])))
            return (light + 0.05) / (dark + 0.05)

        for ground in ("page", "soft"):
            assert contrast("ink", ground) >= 7
            assert contrast("muted", ground) >= 4.5
        assert contrast("c1", "page") >= 4.5, "links"
        assert all(contrast(f"c{number}", "page") >= 3 for number in range(1, 8))


HOSTILE = '<script>alert("x")</script>&\'$a_b$'


def test_names_are_escaped(run_once, edited):
    def rename(result):
        result["participants"][HOSTILE] = result["participants"].pop("site-2") | {"sources": [HOSTILE]}
        for record in result["blocks"]:
            record["participants"][2] = HOSTILE
            record["participant_ties"][HOSTILE] = record["participant_ties"].pop("site-2") + 1
        result["evaluation"] = {
            name: [row | {"text": HOSTILE} for row in measured(a=9.0)] for name in ("dense", HOSTILE)
        }
        result["model"]["source"] = HOSTILE.replace("/", "")

    page = report(edited(run_once(), rename))
    assert "<script" not in page.html
    assert page.text.count(HOSTILE) >= 5
    rows = page.tables["Participants and their calibration text"]
    assert rows[-1][:2] == [HOSTILE, HOSTILE]


def test_names_outside_latin_draw_without_a_warning(run_once, edited):
    def rename(result):
        result["participants"]["東京病院"] = result["participants"].pop("site-2")
        for record in result["blocks"]:
            record["participants"][2] = "東京病院"

    assert report(edited(run_once(), rename)).text.count("東京病院") >= 2


def test_same_record_same_bytes(run_once, tmp_path):
    run = run_once()
    first = write_report(run, tmp_path / "a" / "one.html").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": True}):
        assert write_report(run, tmp_path / "two.html").read_bytes() == first


def test_default_place_is_the_run_itself(run_once):
    run = run_once()
    assert write_report(run) == run / "report.html"


# Errors ----------------------------------------------------------------------------------------


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"no run\.json: expected the folder"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_incomplete_run_is_refused(tiny, tmp_path, monkeypatch):
    from fedprllm.pruning.in_process import _SharedWalk

    step = _SharedWalk.step

    def stop(self, index, advance):
        if index == 2:
            raise KeyboardInterrupt
        step(self, index, advance)

    monkeypatch.setattr(_SharedWalk, "step", stop)
    for strategy in ("one-shot", "local-only"):
        run = tmp_path / strategy
        with pytest.raises(KeyboardInterrupt):
            prune(tiny("llama"), windows_of(2), PruneConfig(strategy=strategy), out=run)
        with pytest.raises(RunError, match=r"not complete: 2 of 3 blocks .*repeat the run\'s command"):
            write_report(run)
        assert not (run / "report.html").exists()


def test_run_that_did_not_start_a_block(run_once, tmp_path):
    shutil.copyfile(run_once() / "run.json", tmp_path / "run.json")
    with pytest.raises(RunError, match="not complete: 0 blocks are finished"):
        write_report(tmp_path)


def test_out_must_be_a_file(run_once, tmp_path):
    with pytest.raises(RunError, match="is a folder: expected the name of the HTML file"):
        write_report(run_once(), tmp_path)


def test_allocation_and_unequal_shares_are_shown(run_once):
    run = run_once(allocation="owl", owl_m=3.0, block_fraction="site-1=0.4")
    page, result = report(run), result_of(run)
    ratios = result["outlier_ratios"]["model"]
    assert page.tables["Allocation of the sparsity"][1:] == [
        [str(record["block"]), f"{ratio * 100:.3f} %", f"{record['sparsity'] * 100:.1f} %"]
        for record, ratio in zip(result["blocks"], ratios, strict=True)
    ]
    sent = {name: participant["update_bytes"] for name, participant in result["participants"].items()}
    assert sent["site-1"] < sent["site-0"] == sent["site-2"]
    assert page.left["before pruning, to find outliers"] == f"{8 * len(ratios)} bytes"
    assert page.left["in total"].startswith(f"{sent['site-1']:,} to {sent['site-0']:,} bytes")
    rows = page.tables["Participants and their calibration text"]
    assert rows[2] == ["site-1", "2", "16", "32", "1 of 3", f"{sent['site-1']:,}"]
    assert "Some blocks received fewer votes because" in page.text


@pytest.mark.parametrize("share", ["mask", "statistics", "gram", "weights"])
def test_bytes_are_said_for_every_way_of_sharing(run_once, share):
    run = run_once(share=share)
    page, result = report(run), result_of(run)
    per_block = result["update_bytes_per_block"]
    n_weights = sum(math.prod(linear["shape"]) for linear in result["blocks"][0]["linears"].values())
    bits = (n_weights + 7) // 8
    assert (
        per_block[0]
        == {
            "mask": bits,
            "statistics": 4 * (3 * 32 + 48),
            "gram": 4 * (3 * 32 * 33 + 48 * 49) // 2,
            "weights": bits + 4 * n_weights,
        }[share]
    )
    assert page.left["per block"].startswith(f"{per_block[0]:,} bytes")
    assert page.left["in total"].startswith(f"{sum(per_block):,} bytes")
    assert {participant["update_bytes"] for participant in result["participants"].values()} == {
        sum(per_block)
    }
    assert ("float rounding may have decided" in page.text) == (share == "statistics")


def test_a_smaller_model_is_called_smaller(run_once):
    run = run_once(structure="mlp=0.3,heads=2", strategy="iterative")
    page, result = report(run), result_of(run)
    (before, after), (dense, small) = (
        result["reduction"][key] for key in ("n_parameters", "n_block_parameters")
    )
    share = f"{(1 - small / dense) * 100:.1f} %"
    assert f"Made {share} smaller (parameters of its decoder blocks) by 3 participants" in page.text
    assert f"{(1 - after / before) * 100:.1f} %" in page.text
    assert f"of all {before:,}, {share} of the blocks'" in page.text
    assert "whatever runs the dense model runs this one" in page.text
    assert "as fast: a zero" not in page.text
    assert ["parameters of the blocks", f"{dense:,}", f"{small:,} -{share}"] in page.tables["Size and speed"]
    assert "zeros" not in page.tables["Size and speed"][1][0]
    assert "Prunes decided by a tie" not in page.text
    narrower = page.tables["Outputs by inputs of the Linears"]
    assert ["mlp.down_proj", "32 by 48", "32 by 34 3 Linears"] in narrower
    linears = {linear["kind"]: linear for linear in result["blocks"][0]["linears"].values()}
    assert linears["mlp.down_proj"]["shape"] == [32, 34]
    assert linears["mlp.down_proj"]["dense_shape"] == [32, 48]
    assert linears["self_attn.q_proj"]["shape"] == [16, 32]
    assert "dense_shape" not in linears["self_attn.k_proj"]
    weights = {path: linear["shape"] for path, linear in linears.items()}
    assert result["n_prunable"] == 3 * sum(math.prod(shape) for shape in weights.values())
    card = (run / "model" / "README.md").read_text()
    assert "tags:\n- pruned\n- smaller\n- fedprllm\n" in card
    assert f"| parameters | {after:,} of {before:,} |" in card
    assert "| structure removed | mlp=0.3,heads=2 |" in card
    assert "sparse kernels" not in card
    assert result["reduction"]["n_bytes"][1] < result["reduction"]["n_bytes"][0]


def test_the_choice_of_a_structure_is_explained(run_once):
    run = run_once(n=2, architecture="gpt2", smaller=0.2)
    page, result = report(run), result_of(run)
    candidates = {one["structure"]: one for one in result["choice"]["candidates"]}
    assert list(candidates) == ["mlp=0.3", "depth=1"]
    chosen = result["config"]["structure"]
    assert candidates[chosen]["loss"] == min(one["loss"] for one in candidates.values())
    n_tokens = candidates[chosen]["n_tokens"]
    assert f"Chosen: {chosen}: the lowest perplexity on {n_tokens} held-out tokens of the" in page.text
    rows = page.tables["Structures to choose among"][1:]
    shown = [[name, one["of_blocks"], one["loss"]] for name, one in candidates.items()]
    expected = [[name, f"{part * 100:.1f} %", f"{math.exp(loss):,.2f}"] for name, part, loss in shown]
    assert [[row[0].removesuffix("chosen").strip(), *row[1:]] for row in rows] == expected
    assert [row[0].endswith("chosen") for row in rows] == [name == chosen for name in candidates]
    assert "Not measured: heads ('transformer.h.0' of GPT2LMHeadModel has 0 Linears" in page.text
    card = (run / "model" / "README.md").read_text()
    assert f"| structure removed | {chosen}, of 2 measured the one with the lowest loss" in card


def test_dropped_blocks_are_no_part_of_the_figures(run_once):
    run = run_once(structure="depth=1")
    page, result = report(run), result_of(run)
    dropped = [record["block"] for record in result["blocks"] if record.get("dropped")]
    assert len(dropped) == 1
    assert "Made 33.3 % smaller" in page.text
    states = [row[2] for row in page.tables["Blocks by how far they turn the hidden states"][1:]]
    assert [number for number, state in enumerate(states) if state == "dropped"] == dropped
    weights = [linear["shape"] for record in result["blocks"] for linear in record["linears"].values()]
    assert result["n_prunable"] == sum(map(math.prod, weights))
    assert page.left["per block"] == "4 bytes"
