"""`icecache eval report`: the tables of a run as markdown; `html` and `figures` make a page of them.

Every score stands beside what it cannot resolve; every claim is made of an interval's lower bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from icecache.errors import ConfigError
from icecache.eval import stats
from icecache.eval.equal import at_equal_load
from icecache.eval.markdown import ABSENT, number, points, share, signed, table
from icecache.eval.record import Setup
from icecache.eval.results import DISCRIMINATES, ORACLES, Cell, Results, budget_of

KEPT: Final = (0.99, 0.97)
"""Shares of full attention that a claim can be made about."""
OURS: Final = "icecache"
FORMATS: Final = ("md", "html")
TASK_BY_TASK: Final = "## Task by task"


def write_report(
    folder: Path, out: Path | None = None, budget: int | None = None, formats: Sequence[str] = ("md",)
) -> tuple[str, list[Path]]:
    """Write a run's report.

    Parameters
    ----------
    folder : Path
        Of the run.
    out : Path or None, default=None
        Where to; the suffix follows from the format. Default: `report` in the folder.
    budget : int or None, default=None
        Only arms of this budget, and those without; None: all.
    formats : sequence of str, default=("md",)
        Of `FORMATS`.

    Returns
    -------
    text : str
        The report as markdown.
    paths : list of Path
        What was written.

    Raises
    ------
    DataError
        If the folder holds no run.
    ConfigError
        If no arm has the budget, or a format is unknown.
    """
    if not formats or set(formats) - set(FORMATS):
        msg = f"--format must be one or more of {', '.join(FORMATS)}, got {', '.join(formats)}"
        raise ConfigError(msg)
    results = Results.read(folder)
    if budget is not None and budget not in results.budgets:
        msg = f"--budget must be one of {', '.join(map(str, results.budgets)) or 'none'}, got {budget}"
        raise ConfigError(msg)
    parts = list(sections(results, budget))
    text = "\n\n".join(parts) + "\n"
    written = []
    for kind in dict.fromkeys(formats):
        path = _path(folder, out, kind, formats)
        path.write_text(text if kind == "md" else _page(results, parts, budget, folder), encoding="utf-8")
        written.append(path)
    return text, written


def _path(folder: Path, out: Path | None, kind: str, formats: Sequence[str]) -> Path:
    if out is None:
        return folder / f"report.{kind}"
    # One format: the very name that was asked for.
    return out if len(set(formats)) == 1 else out.with_suffix(f".{kind}")


def _page(results: Results, parts: Sequence[str], budget: int | None, folder: Path) -> str:
    # matplotlib takes a second to load.
    from icecache.eval.figures import draw
    from icecache.eval.html import to_page

    drawings = [*draw(results, budget)]
    if (folder / "attention.json").exists():
        from icecache.eval.panel import FILE, draw_attention, read_rows

        drawings += draw_attention(read_rows(folder / FILE))
    return to_page(parts, drawings, folded=TASK_BY_TASK)


def sections(results: Results, budget: int | None = None) -> Iterator[str]:
    """Yield the report's parts.

    Parameters
    ----------
    results : Results
        The run.
    budget : int or None, default=None
        As in `write_report`.
    """
    arms = [arm for arm in results.arms if budget is None or budget_of(arm) in (budget, None)]
    yield "# Evaluation under a budget"
    yield introduction(results)
    yield controls(results)
    yield summary(results, arms)
    for setup, length in results.groups:
        name = f"Setup {setup}" + (f", {length:,} tokens" if length else "")
        yield f"## {name}"
        yield headline(results, setup, length, arms)
        if excluded := not_discriminating(results, setup, length):
            yield excluded
        if rivals := against_rivals(results, setup, length):
            yield rivals
        if equal := at_equal_load(results, setup, length, OURS):
            yield equal
        yield accounting(results, setup, length, arms)
        if graded := further_grades(results, setup, length, arms):
            yield graded
    yield details(results, arms)
    yield footer(results)


def introduction(results: Results) -> str:
    """Say what the numbers are."""
    lines = [
        "Scores in points (0 to 100), greedy answers, every arm on the same prompts. Setup A: the question is part of "
        "the dense prefill. Setup B: question and answer attend under the budget. *macro* is the mean over tasks that "
        f"discriminate: where random pages of the same budget lose {100 * DISCRIMINATES:.0f} points or more to full "
        "attention. Intervals are 95 %, from paired bootstrap over samples within tasks "
        f'({stats.RESAMPLES:,} resamples). "≥ 0.99" means that the interval of the ratio to full begins there. '
        "An average over 3 of 5 such tasks, because the arm did not run on the others, is marked (3/5)."
    ]
    labels = results.manifest.labels if results.manifest else {}
    lines += [f"Suite `{name}` is {label}." for name, label in labels.items()]
    return "\n\n".join(lines)


def controls(results: Results) -> str:
    """Say what the controls found, and whether the run is valid."""
    noise = _differing(results, "full-eager")
    exact = _differing(results, "exact")
    lines = ["## Controls"]
    if noise is not None:
        pairs = [p for cell in results.cells if (p := results.pairs(cell, "full", "full-eager"))]
        floor = stats.macro_difference([p.first for p in pairs], [p.second for p in pairs])
        lines.append(
            f"Noise floor, full attention with the eager kernel instead: {noise[0]} of {noise[1]} answers differ, "
            f"{signed(floor)} points. Smaller differences mean nothing."
        )
    else:
        lines.append("Noise floor: not measured (`full-eager` did not run).")
    if exact is None:
        lines.append("`exact` did not run: nothing shows that a budget over the whole context gives full attention.")
    elif exact[0] <= (noise[0] if noise else 0):
        lines.append(
            f"`exact` (a budget over the whole context): {exact[0]} of {exact[1]} answers differ from full. Valid."
        )
    else:
        lines.append(
            f"**INVALID RUN**: `exact` (a budget over the whole context) differs from full in {exact[0]} of {exact[1]} "
            "answers, more than another attention kernel does."
        )
    return "\n\n".join(lines)


def summary(results: Results, arms: Sequence[str]) -> str:
    """Write the macro average of every arm in every setup and length, side by side."""
    header = ["arm"]
    for setup, length in results.groups:
        header += [f"{setup} {length:,}".removesuffix(" 0"), "Δ full"]
    rows = []
    for arm in arms:
        columns = [cell for setup, length in results.groups for cell in macro_columns(results, setup, length, arm)[:2]]
        rows.append([arm, *columns])
    return f"## Macro averages, by setup and length\n\n{table(header, rows)}"


def _differing(results: Results, arm: str) -> tuple[int, int] | None:
    """Answers of an arm that differ from full attention's, of how many."""
    n_differing = n_all = 0
    for cell in results.cells:
        full, other = results.records(cell, "full"), results.records(cell, arm)
        for name in full.keys() & other.keys():
            n_all += 1
            n_differing += full[name].prediction != other[name].prediction
    return (n_differing, n_all) if n_all else None


def headline(results: Results, setup: Setup, length: int, arms: Sequence[str]) -> str:
    """Write arms x tasks with the macro average, and its distance to full attention."""
    cells = results.of_group(setup, length)
    header = ["arm", *(cell.task for cell in cells), "macro", "Δ full", "ratio", "claim", "cannot resolve"]
    rows = []
    for arm in arms:
        scores = [results.score(cell, arm) for cell in cells]
        if all(score is None for score in scores):
            continue
        rows.append([arm, *map(points, scores), *macro_columns(results, setup, length, arm)])
    sizes = sorted({len(results.records(cell, "full")) for cell in cells})
    counts = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return f"{counts} samples a task.\n\n{table(header, rows)}"


def macro_columns(results: Results, setup: Setup, length: int, arm: str) -> list[str]:
    """Macro average, difference and ratio to full, the claim these allow, and the resolution, in points."""
    used = results.averaged(setup, length, ["full", arm])
    pairs = [p for cell in used if (p := results.pairs(cell, "full", arm))]
    if not pairs:
        return [ABSENT] * 5
    first, second = [p.first for p in pairs], [p.second for p in pairs]
    macro = points(sum(float(p.second.mean()) for p in pairs) / len(pairs))
    n_countable = len(countable(results, setup, length, arm))
    if len(pairs) < n_countable:
        macro = f"{macro} ({len(pairs)}/{n_countable})"
    if arm == "full":
        return [macro, ABSENT, ABSENT, ABSENT, ABSENT]
    ratio = stats.macro_ratio(first, second)
    return [
        macro,
        signed(stats.macro_difference(first, second)),
        share(ratio),
        claim(ratio),
        f"< {points(stats.macro_resolution(first, second))}",
    ]


def countable(results: Results, setup: Setup, length: int, arm: str) -> list[Cell]:
    """Cells that an arm's average would be over if it had run everywhere."""
    cells = results.averaged(setup, length, ["full"])
    return [cell for cell in cells if results.discriminates(cell, budget_of(arm)) is not False]


def claim(ratio: stats.Interval) -> str:
    """Say what share of full attention is shown to be kept, by the interval's lower bound; never by the estimate."""
    shown = [f"≥ {kept:.2f}" for kept in KEPT if ratio.low >= kept]
    return shown[0] if shown else "not shown"


def not_discriminating(results: Results, setup: Setup, length: int) -> str:
    """List tasks that leave the average, by budget."""
    lines = []
    for budget in results.budgets:
        flags = {cell.task: results.discriminates(cell, budget) for cell in results.of_group(setup, length)}
        if out := [task for task, flag in flags.items() if flag is False]:
            lines.append(f"Not discriminating at {budget}, left out of its macro: {', '.join(out)}.")
        if unknown := [task for task, flag in flags.items() if flag is None]:
            lines.append(f"Not known to discriminate at {budget} (`random` did not run): {', '.join(unknown)}.")
    return "\n".join(lines)


def against_rivals(results: Results, setup: Setup, length: int) -> str:
    """Write our smallest budget against every rival at every budget, and against rivals that load as much."""
    ours = [arm for arm in results.arms if arm.partition("@")[0] == OURS]
    rivals = [
        arm for arm in results.arms if budget_of(arm) and arm not in ours and arm.partition("@")[0] not in ORACLES
    ]
    if not ours or not rivals:
        return ""
    rows = []
    for rival in rivals:
        loaded = loaded_tokens(results, setup, length, rival)
        equal = [arm for arm in ours if _at_most(loaded_tokens(results, setup, length, arm), loaded)]
        columns = [difference_between(results, setup, length, rival, ours[0])]
        if equal:
            columns += [equal[-1], difference_between(results, setup, length, rival, equal[-1])]
        else:
            columns += [ABSENT, ABSENT]
        n_tasks = len(results.averaged(setup, length, ["full", rival, ours[0]]))
        rows.append([rival, number(loaded), str(n_tasks), *columns])
    text = (
        f"`{ours[0]}` minus each rival, macro over tasks that discriminate at both budgets; and the arm of ours that "
        "loads no more tokens per KV head than the rival does (within 2 %)."
    )
    header = ["rival", "loaded", "tasks", f"{ours[0]} minus rival", "at equal load", "minus rival"]
    return f"### Against rivals\n\n{text}\n\n{table(header, rows)}"


def _at_most(value: float | None, limit: float | None) -> bool:
    # 2 %: what waits for the index comes on top of a budget, and differs by policy and step.
    return value is not None and limit is not None and value <= 1.02 * limit


def loaded_tokens(results: Results, setup: Setup, length: int, arm: str) -> float | None:
    """Tokens an arm loads per KV head and step, mean over a group."""
    return results.mean(results.of_group(setup, length), arm, "loaded")


def difference_between(results: Results, setup: Setup, length: int, first: str, second: str) -> str:
    """Macro difference of two arms, second minus first, with its interval."""
    used = results.averaged(setup, length, ["full", first, second])
    pairs = [p for cell in used if (p := results.pairs(cell, first, second))]
    if not pairs:
        return ABSENT
    return signed(stats.macro_difference([p.first for p in pairs], [p.second for p in pairs]))


def accounting(results: Results, setup: Setup, length: int, arms: Sequence[str]) -> str:
    """Write what each arm really read, and how long it took."""
    cells = results.of_group(setup, length)
    header = ["arm", "attended", "loaded", "dense layers", "generated kept", "mass", "TTFT s", "TPOT ms"]
    rows = []
    for arm in arms:
        record = next((r for cell in cells for r in results.records(cell, arm).values()), None)
        if record is None:
            continue
        dense = ", ".join(map(str, record.stats.dense_layers)) or "none"
        tpot = results.mean(cells, arm, "tpot_s")
        rows.append(
            [
                arm,
                number(results.mean(cells, arm, "attended")),
                number(results.mean(cells, arm, "loaded")),
                dense,
                record.stats.generated_kept or ABSENT,
                number(results.mean(cells, arm, "mass"), 3),
                number(results.mean(cells, arm, "ttft_s"), 2),
                number(None if tpot is None else 1e3 * tpot, 1),
            ]
        )
    text = (
        "Tokens attended per query head and loaded per KV head (the union over its query heads), per sparse layer and "
        "step. Times are of whole batches on this machine; other policies than ours are built to be right, not fast."
    )
    return f"### Accounting\n\n{text}\n\n{table(header, rows)}"


def further_grades(results: Results, setup: Setup, length: int, arms: Sequence[str]) -> str:
    """Write the means of further grades, where tasks have them."""
    columns: dict[tuple[Cell, str], None] = {}
    for cell in results.of_group(setup, length):
        for record in results.records(cell, "full").values() or ():
            columns |= dict.fromkeys((cell, name) for name in record.grades)
    if not columns:
        return ""
    rows = []
    for arm in arms:
        means = []
        for cell, name in columns:
            graded = [r.grades[name] for r in results.records(cell, arm).values() if name in r.grades]
            means.append(points(sum(graded) / len(graded)) if graded else ABSENT)
        rows.append([arm, *means])
    return f"### Further grades\n\n{table(['arm', *(f'{c.task}: {name}' for c, name in columns)], rows)}"


def details(results: Results, arms: Sequence[str]) -> str:
    """Write every task and arm against full attention, with McNemar's counts."""
    header = [
        "task",
        "setup",
        "arm",
        "n",
        "score",
        "Δ full",
        "ratio",
        "only full / only arm right",
        "p",
        "cannot resolve",
    ]
    rows = []
    for cell in results.cells:
        for arm in arms:
            pairs = results.pairs(cell, "full", arm)
            if arm == "full" or pairs is None:
                continue
            counts = stats.mcnemar(pairs.first, pairs.second)
            rows.append(
                [
                    f"{cell.task} {cell.length}" if cell.length else cell.task,
                    cell.setup,
                    arm,
                    str(len(pairs.ids)),
                    points(float(pairs.second.mean())),
                    signed(stats.macro_difference([pairs.first], [pairs.second])),
                    share(stats.macro_ratio([pairs.first], [pairs.second])),
                    f"{counts.only_first} / {counts.only_second}",
                    f"{counts.p_value:.2g}",
                    f"< {points(stats.resolution(pairs.first, pairs.second))}",
                ]
            )
    return f"{TASK_BY_TASK}\n\n{table(header, rows)}"


def footer(results: Results) -> str:
    """Say how to make it again."""
    if results.manifest is None:
        return ""
    manifest = results.manifest
    identity = ", ".join(f"{key} {value}" for key, value in manifest.identity.items())
    lines = ["## How it was made", f"{identity}."]
    lines += [f"Data: {name} (SHA-256 {digest})" for name, digest in sorted(manifest.data.items())]
    for part in manifest.parts:
        facts = {**part.hardware, **part.versions, "commit": part.git or "none"}
        listed = ", ".join(f"{key} {value}" for key, value in facts.items())
        lines.append(f"{part.started}: `{part.command}`\n({listed})")
    return "\n\n".join(lines)
