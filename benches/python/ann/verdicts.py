"""What we set out to reach against the others, judged by the figures."""

from __future__ import annotations

from dataclasses import dataclass

from ann.summary import Row, paired_ratio

OURS = "icecache"
KEYS = ("keys36k", "keys300k")
#: Variants of the same structure that a target compares with.
ANY_PEER = "any peer"


@dataclass(frozen=True, slots=True)
class Target:
    """One line of the list.

    Attributes
    ----------
    what : {"qps", "build", "insert", "default", "churn", "overhead"}
        Figure; the first three are ratios against `rival`, larger = better for us.
    data : str
    bound : float
        Lowest ratio or recall, highest loss or bytes, that passes.
    rival : str
        Peer, or the fastest of all.
    k : int
    """

    what: str
    data: str
    bound: float
    rival: str = ""
    k: int = 10


def targets(data: list[str]) -> list[Target]:
    """Targets of the data sets at hand."""
    out: list[Target] = []
    for name in data:
        if name.startswith("keys"):
            out += [Target("qps", name, 2.0, ANY_PEER), Target("qps", name, 10.0, "hnswlib_ctr")]
            for rival in ("hnswlib_ctr", "hnswlib"):
                out += [Target("build", name, 10.0, rival), Target("insert", name, 30.0, rival)]
        elif name.startswith("gmm"):
            out += [Target("qps", name, 1.5, "hnswlib"), Target("qps", name, 0.8, "scann")]
            out += [Target("qps", name, 3.0, "hnswlib", 100), Target("qps", name, 0.9, "scann", 100)]
        else:
            out.append(Target("qps", name, 1.0, "hnswlib"))
        out += [Target("default", name, 0.95), Target("churn", name, 0.01), Target("overhead", name, 48.0)]
    return out


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target with what was measured; `passed` is None where it was not."""

    target: Target
    value: float | None
    passed: bool | None
    note: str = ""

    def line(self) -> str:
        """One line of the report."""
        t = self.target
        what = {
            "qps": f"queries/s at recall@{t.k} .95, over {t.rival}",
            "build": f"build, CPU time of {t.rival} over ours",
            "insert": f"insertion by 256, CPU time of {t.rival} over ours",
            "default": "recall@10 with default settings",
            "churn": "recall@10 lost by 25 % insertions and deletions",
            "overhead": "bytes a vector beside the vectors",
        }[t.what]
        mark = {True: "pass", False: "FAIL", None: "not measured"}[self.passed]
        sign = "<=" if t.what in ("churn", "overhead") else ">="
        value = "-" if self.value is None else f"{self.value:.3g}"
        return f"{mark:12s} {t.data:10s} {what:58s} {value:>7s}  ({sign} {t.bound:g}) {self.note}".rstrip()


def judge(rows: list[Row]) -> list[Verdict]:
    """Verdict on each target of the data sets that the rows come from."""
    data = list(dict.fromkeys(row.data for row in rows))
    return [_judge(target, rows) for target in targets(data)]


def _judge(target: Target, rows: list[Row]) -> Verdict:
    here = {row.peer: row for row in rows if row.data == target.data}
    ours = here.get(OURS)
    if ours is None:
        return Verdict(target, None, None, "ours was not run")
    if target.what == "qps":
        return _judge_speed(target, ours, here)
    if target.what in ("build", "insert"):
        figure = "build_cpu_s" if target.what == "build" else "insert_batch_us"
        mine, theirs = getattr(ours, figure), getattr(here.get(target.rival), figure, None)
        value = theirs / mine if mine and theirs else None
        return Verdict(target, value, None if value is None else value >= target.bound)
    if target.what == "default":
        value = ours.default_recall(target.k)
        return Verdict(target, value, None if value is None else value >= target.bound)
    value = ours.churn_loss() if target.what == "churn" else ours.overhead
    # Growth of the process holds thread stacks and spare pages too; it is the stricter figure, and all peers have it.
    note = f"process growth; the index counts {ours.declared:g}" if target.what == "overhead" and ours.declared else ""
    return Verdict(target, value, None if value is None else value <= target.bound, note)


def _judge_speed(target: Target, ours: Row, here: dict[str, Row]) -> Verdict:
    """Ratio of batched speeds at recall .95; interleaved rounds where there are some for both sides."""
    rivals = [r for r in here.values() if not r.peer.startswith(OURS) and target.rival in (ANY_PEER, r.peer)]
    if not rivals or all(r.highest_recall(target.k) is None for r in rivals):
        return Verdict(target, None, None, "no figures of the rival")
    mine = ours.qps(target.k, 0.95)
    if mine is None:
        return Verdict(target, None, False, "ours did not reach .95")
    ratios: dict[str, tuple[float, str]] = {}
    for rival in rivals:
        paired, speed = paired_ratio(ours, rival, target.k), rival.qps(target.k, 0.95)
        if paired:
            middle, low, high = paired
            rounds = len(ours.pairs[target.k])
            ratios[rival.peer] = middle, f"{rival.peer}, interleaved, {low:.2f} to {high:.2f} over {rounds} rounds"
        elif speed:
            ratios[rival.peer] = mine / speed, f"{rival.peer}, one after the other"
    if ratios:
        value, note = min(ratios.values())
        return Verdict(target, value, value >= target.bound, note)
    if any(r.end != "done" for r in rivals):
        return Verdict(target, None, None, "the rival did not reach .95 within its budget")
    highest = max(r.highest_recall(target.k) or 0.0 for r in rivals)
    return Verdict(target, float("inf"), True, f"the rival does not reach .95 (highest {highest:.3f})")
