"""The command line as a person or a program uses it: documents, exit codes, one line for whatever goes wrong."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tests.folders import ARCHITECTURES, CONTEXT, save_model, small_tokenizer

from headwise.cli import run

PROMPT = "Clara Marsh and Boris"


@pytest.fixture(scope="session")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer):
    """Name of an architecture -> a folder with such a model, written once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def of(name: str) -> str:
        if name not in made:
            made[name] = str(save_model(name, root / name, tokenizer))
        return made[name]

    return of


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("Clara Marsh met Boris Keller. Boris Keller met Clara Marsh, and Clara Marsh laughed. " * 3)
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command in a folder of its own -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def of(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return of


@pytest.fixture
def document(call):
    """Run a command with --json -> its document; nothing else may stand on stdout."""

    def of(*arguments: object):
        code, out, err = call(*arguments, "--json")
        assert code == 0, err
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))

    return of


def marked(found: dict) -> bool:
    return found["headwise"] == __import__("headwise").__version__ and found["schema"] == 1


# --- scan -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_folder_of_any_architecture_scans_and_steers(name, folder, document, text):
    found = document("scan", folder(name), "--text", text)
    assert marked(found)
    assert (found["layers"], found["heads"]) == (2, 4)
    assert found["towers"][0]["heads_per_layer"] == [4, 4]
    assert {"sink", "previous", "induction", "entropy", "induction-repeat"} <= set(found["probes"])
    assert set(found["probes"]["sink"]) == {f"{layer}.{head}" for layer in range(2) for head in range(4)}
    assert all(0 <= score <= 1 for score in found["probes"]["sink"].values())
    assert any("windows" in note for note in found["notes"]), "the text is longer than the context, and it says so"

    options = ("--edit", "ablate", "--heads", "0.*", "--prompt", PROMPT, "--max-new-tokens", 6)
    steered = document("steer", folder(name), *options)
    assert marked(steered)
    assert steered["heads"] == ["0.0", "0.1", "0.2", "0.3"]
    assert len(steered["tokens"]["plain"]) == 6
    assert steered["plain"] != steered["steered"], "a model without its first layer writes something else"
    assert steered["changed_at"] is not None


def test_the_report_and_its_files(folder, call, text, tmp_path):
    code, out, _ = call("scan", folder("llama"), "--text", text, "--probe", "sink,previous", "--out", "here")
    assert code == 0
    files = {path.name for path in (tmp_path / "here").iterdir()}
    assert files == {"heads.json", "heads.csv", "heads.png", "report.html"}
    assert "report: here/report.html" in out
    assert "sink\t1\t" in out
    heads = json.loads((tmp_path / "here" / "heads.json").read_text())
    assert marked(heads)
    page = (tmp_path / "here" / "report.html").read_text(encoding="utf-8")
    assert "top:sink:4" in page
    assert " Boris" in page, "the report shows the tokens of the text"
    assert str(tmp_path / "here" / "heads.json") not in page
    assert "--map here/heads.json" in page


def test_without_out_files_go_into_a_folder_of_the_model(folder, call, text, tmp_path):
    code, out, _ = call("scan", folder("llama"), "--text", text, "--probe", "sink")
    assert code == 0
    assert (tmp_path / "headwise-out" / "llama" / "report.html").is_file()
    assert "headwise-out/llama/report.html" in out


def test_json_writes_files_only_where_it_is_told_to(folder, document, text, tmp_path):
    assert document("scan", folder("llama"), "--text", text, "--probe", "sink")["files"] == []
    assert not (tmp_path / "headwise-out").exists()
    named = document("scan", folder("llama"), "--text", text, "--probe", "sink", "--out", "o")["files"]
    assert [Path(path).name for path in named] == ["heads.json", "heads.csv", "heads.png", "report.html"]


def test_comparing_two_models(folder, document, call, text, tmp_path):
    found = document("scan", folder("llama"), "--text", text, "--probe", "sink", "--compare", folder("gpt2"))
    one = found["comparison"]["probes"]["sink"]
    assert set(one) == {"scores", "correlation", "overlap", "k"}
    assert one["scores"]["0.0"] != 0
    call("scan", folder("llama"), "--text", text, "--probe", "sink", "--out", "first")
    code, out, _ = call(
        "scan", folder("llama"), "--text", text, "--probe", "sink", "--out", "o", "--compare", "first/heads.json"
    )
    assert code == 0
    assert "sink: rank correlation +1.00, 100% of the 2 strongest in common" in out


def test_probes_of_the_user(folder, document, text, tmp_path):
    (tmp_path / "my_probes.py").write_text(
        "from headwise.attend.read import Probe\n"
        "class SelfAttention(Probe):\n"
        "    name = 'self'\n"
        "    sentence = 'How much the head attends to the token itself.'\n"
        "    def sparse(self, reading):\n"
        "        weights, real = reading.diagonal(0)\n"
        "        rows = real & reading.valid\n"
        "        self.add(reading, (weights * rows[:, None]).sum((0, 2)), rows.sum())\n"
    )
    found = document("scan", folder("llama"), "--text", text, "--probe", "my_probes:SelfAttention,sink")
    assert set(found["probes"]) == {"self", "sink"}


def test_an_encoder_skips_what_it_has_not(folder, document, text):
    found = document("scan", folder("bert"), "--text", text)
    assert "induction" not in found["probes"]
    assert any("induction" in note and "bidirectional" in note for note in found["notes"])
    assert any("induction-repeat" in note for note in found["notes"])


def test_an_encoder_decoder_is_read_in_every_tower(folder, document, text):
    found = document("scan", folder("bart"), "--text", text, "--probe", "sink,induction")
    assert [tower["name"] for tower in found["towers"]] == ["decoder", "encoder", "cross"]
    assert all(found["probes"]["sink"][f"{tower}:1.3"] is not None for tower in ("decoder", "encoder", "cross"))
    assert found["probes"]["induction"]["decoder:0.0"] is not None
    assert found["probes"]["induction"]["encoder:0.0"] is None


def test_pictures_for_vision_models(folder, document, call, tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        image.new("RGB", (20, 30), (40 * number, 100, 9)).save(tmp_path / "pictures" / f"{number}.png")
    found = document("scan", folder("vit"), "--images", "pictures", "--probe", "sink")
    assert found["source"] == "3 pictures of pictures"
    assert all(score is not None for score in found["probes"]["sink"].values())
    both = document("scan", folder("clip"), "--images", "pictures", "--probe", "sink")
    assert all(both["probes"]["sink"][f"{tower}:0.0"] is not None for tower in ("text", "vision"))
    code, _, err = call("scan", folder("vit"))
    assert (code, err.count("\n")) == (2, 1)
    assert "--images DIR" in err


def test_steering_a_planted_head(document):
    found = document(
        "steer", "planted", "--edit", "ablate", "--heads", "top:induction:1",
        "--prompt", "Ann apple Ben red coin Ann", "--max-new-tokens", 4,
    )  # fmt: skip
    assert found["plain"] == "apple Ben red coin"
    assert found["heads"] == ["1.0"]
    assert found["changed_at"] == 0


# --- steer ----------------------------------------------------------------------------------------------------------


def test_a_sweep_shows_losses_beside_texts(folder, document):
    found = document(
        "steer", folder("llama"), "--edit", "bias-group:group=first", "--sweep", "bias=-1.5,0,-inf",
        "--prompt", PROMPT, "--max-new-tokens", 4, "--reference", "Keller",
    )  # fmt: skip
    assert found["sweep"]["parameter"] == "bias"
    rows = found["sweep"]["rows"]
    assert [row["value"] for row in rows] == [-1.5, 0, "-inf"]
    assert rows[1]["prompt_loss"] == pytest.approx(found["loss"]["plain"]["prompt"], abs=1e-6)
    assert rows[1]["changed_at"] is None
    assert rows[0]["reference_loss"] != found["loss"]["plain"]["reference"]
    assert found["reference"] == " Keller"


def test_edits_of_generated_tokens_act_on_the_reference(folder, document):
    options = ("--prompt", PROMPT, "--max-new-tokens", 2, "--reference", "Keller met Clara")
    found = document("steer", folder("llama"), "--edit", "ablate:mode=uniform", "--when", "generated", *options)
    assert found["loss"]["steered"]["prompt"] == found["loss"]["plain"]["prompt"]
    assert found["loss"]["steered"]["reference"] != found["loss"]["plain"]["reference"]


def test_groups_heads_and_edits_by_name(folder, document, tmp_path):
    (tmp_path / "my_edits.py").write_text(
        "from dataclasses import dataclass\n"
        "from headwise.attend.edits import ScaleHeads\n"
        "@dataclass\n"
        "class Half(ScaleHeads):\n"
        "    scale: float = 0.5\n"
        "def flat(weights, rows):\n"
        "    return rows.visible / rows.visible.sum(-1, keepdim=True) + 0 * weights\n"
    )
    common = ("--prompt", PROMPT, "--max-new-tokens", 2)
    for edit, group in [
        ("bias-group:bias=2", "spans:1-2+4"),
        ("bias_group:group=recent:2,bias=inf", None),
        ("scale-group:group=tokens:and,factor=0.2,remainder=renormalise", None),
        ("scale-group:group=positions:0+2,factor=0", None),
        ("my_edits:Half:scale=0.1", None),
        ("edit-rows:function=my_edits:flat", None),
        ("ablate:mode=mean", None),
        ("zero-tuning:gamma=3", None),
    ]:
        found = document("steer", folder("llama"), "--edit", edit, *(["--group", group] if group else []), *common)
        assert found["edits"][0]["edit"] == edit.partition(":")[0].replace("_", "-") or edit.startswith("my_edits")
        assert found["loss"]["plain"] != found["loss"]["steered"], edit


def test_heads_by_the_scores_of_a_file(folder, document, call, text):
    call("scan", folder("llama"), "--text", text, "--probe", "sink", "--out", "o")
    scores = json.loads(Path("o/heads.json").read_text())["probes"]["sink"]
    found = document(
        "steer", folder("llama"), "--edit", "ablate", "--heads", "top:sink:2", "--map", "o/heads.json",
        "--prompt", PROMPT, "--max-new-tokens", 1,
    )  # fmt: skip
    assert found["heads"] == sorted(scores, key=lambda head: (-scores[head], head))[:2]
    assert found["notes"] == []


def test_the_chat_template_is_for_prompts(tokenizer, document, tmp_path, text):
    template = "{% for turn in messages %}Boris: {{ turn['content'] }}{% endfor %}{{ '\\n' }}Clara:"
    folder = save_model("llama", tmp_path / "chat", tokenizer, chat_template=template)
    found = document("steer", folder, "--edit", "ablate", "--prompt", "hello", "--max-new-tokens", 1)
    assert "".join(found["tokens"]["prompt"]) == "Boris: hello\nClara:"
    scanned = document("scan", folder, "--text", text, "--probe", "sink")
    plain = len(tokenizer(text.read_text())["input_ids"])
    assert scanned["source"] == f"notes.txt, {plain} tokens"


def test_what_is_written_cannot_steer_a_terminal(folder, call):
    _, out, _ = call("steer", folder("llama"), "--edit", "ablate", "--prompt", "red \x1b[31m", "--max-new-tokens", 1)
    assert "\x1b" not in out


# --- what goes wrong ------------------------------------------------------------------------------------------------

BAD = {
    "unknown command": ("scna", "Did you mean 'scan'?"),
    "unknown option": ("scan --porbe sink", "--probe"),
    "unknown model": ("scan no-such-model", "no-such-model"),
    "missing folder": ("scan ./no/such/folder", "no/such/folder"),
    "missing text": ("scan {llama} --text none.txt", "none.txt cannot be read"),
    "binary text": ("scan {llama} --text binary.txt", "binary.txt is a binary file"),
    "empty text": ("scan {llama} --text empty.txt", "empty.txt is empty"),
    "not UTF-8": ("scan {llama} --text latin.txt", "is not UTF-8"),
    "JSONL without text": ("scan {llama} --text bad.jsonl", "line 1"),
    "unknown probe": ("scan {llama} --probe indction", "did you mean 'induction'?"),
    "probe of no module": ("scan {llama} --probe nowhere:Thing", "no module 'nowhere'"),
    "no probe left": ("scan {bert} --probe induction", "bidirectional"),
    "window": ("scan {llama} --window 2", "at least 8"),
    "rows": ("scan {llama} --rows some", "auto or all"),
    "off the interface": ("scan {bloom}", "BloomForCausalLM"),
    "pickle": ("scan {pickle}", "safetensors"),
    "out": ("scan {llama} --out empty.txt/x", "cannot be written"),
    "compare with nothing": ("scan {llama} --compare none.json", "none.json is not there"),
    "compare with others": ("scan {llama} --probe sink --text t.txt --compare planted", "the same heads"),
    "device": ("scan {llama} --device quantum", "'quantum' cannot be used"),
    "dtype": ("scan {llama} --dtype int8", "int8"),
    "unknown edit": ("steer {llama} --edit abalte --prompt x", "did you mean 'ablate'?"),
    "unknown parameter": ("steer {llama} --edit zero-tuning:gama=2 --prompt x", "did you mean 'gamma'?"),
    "wrong value": ("steer {llama} --edit zero-tuning:gamma=much --prompt x", "gamma is 'much'; expected a number"),
    "refused value": ("steer {llama} --edit zero-tuning:gamma=-1 --prompt x", "must be 0 or more"),
    "unknown choice": ("steer {llama} --edit ablate:mode=zro --prompt x", "did you mean 'zero'?"),
    "missing parameter": ("steer {llama} --edit bias-group:bias=1 --prompt x", "group"),
    "unknown group": ("steer {llama} --edit bias-group:bias=1,group=frist --prompt x", "did you mean 'first'?"),
    "span beyond the prompt": (
        "steer {llama} --edit bias-group:bias=1,group=spans:8-9 --prompt x",
        "beyond the prompt",
    ),
    "only from Python": ("steer {llama} --edit replace-heads:values=1 --prompt x", "from Python only"),
    "layer out of range": ("steer {llama} --edit ablate --heads 9.0 --prompt x", "2 layers (0 to 1)"),
    "head out of range": ("steer {llama} --edit ablate --heads 1.7 --prompt x", "4 heads (0 to 3)"),
    "unknown probe of heads": ("steer {llama} --edit ablate --heads top:sikn:2 --prompt x", "did you mean 'sink'?"),
    "no such map": ("steer {llama} --edit ablate --map none.json --prompt x", "none.json is not there"),
    "no edit": ("steer {llama} --prompt x", "--edit"),
    "no prompt": ("steer {llama} --edit ablate", "--prompt"),
    "empty prompt": ("steer {llama} --edit ablate --prompt ''", "empty"),
    "long prompt": ("steer {llama} --edit ablate --prompt LONG", f"reads {CONTEXT}"),
    "encoder": ("steer {vit} --edit ablate --prompt x", "does not write text"),
    "sweep": ("steer {llama} --edit ablate --sweep gamma=1 --prompt x", "no edit here has a parameter 'gamma'"),
    "sweep of nothing": ("steer {llama} --edit ablate --sweep mode --prompt x", "key=value"),
    "when": ("steer {llama} --edit ablate --when now --prompt x", "all, prompt or generated"),
    "unknown paper": ("papers zero-tunning", "did you mean zero-tuning?"),
    "no paper": ("reproduce", "--all"),
    "unknown paper to run": ("reproduce zero-tunning", "did you mean zero-tuning?"),
    "unknown specimen": ("train txet", "did you mean 'text'?"),
    "unknown benchmark": ("bench atend", "did you mean 'attend'?"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_code_2(name, folder, call, tmp_path):
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "t.txt").write_text("one two three one two three")
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text('{"title": "no text here"}\n')
    template, said = BAD[name]
    names = {key: folder(key) for key in ("llama", "bert", "bloom", "vit") if f"{{{key}}}" in template}
    if "{pickle}" in template:
        (tmp_path / "pickle").mkdir()
        (tmp_path / "pickle" / "config.json").write_text((Path(folder("llama")) / "config.json").read_text())
        torch.save({}, tmp_path / "pickle" / "pytorch_model.bin")
        names["pickle"] = str(tmp_path / "pickle")
    arguments = [part.replace("LONG", PROMPT * 40) for part in shlex.split(template.format(**names))]
    if list(BAD).index(name) % 2 and name != "unknown command":  # the line is the same with and without
        arguments.append("--json")
    code, out, err = call(*arguments)
    assert code == 2, err
    assert out == ""
    assert err.count("\n") == 1, "one line"
    assert err.startswith("headwise: ")
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "headwise-out" / "llama" / "report.html").exists()


def test_an_unwritable_folder_is_refused_before_the_work(call, monkeypatch, folder, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("headwise.api.scan", lambda *_, **__: pytest.fail("the work had begun"))
    code, _, err = call("scan", folder("llama"), "--out", "file")
    assert code == 2
    assert "out: file cannot be written" in err


def test_a_fault_of_ours_is_one_line_too(call, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a\nb")

    monkeypatch.setattr("headwise.papers.recorded.catalogue", broken)
    code, out, err = call("papers")
    assert (code, out) == (1, "")
    assert err == "headwise: RuntimeError: a b; this is a fault of headwise, HEADWISE_TRACEBACK=1 shows where\n"


def test_an_interruption_is_130(call, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("headwise.papers.recorded.catalogue", interrupted)
    assert call("papers") == (130, "", "headwise: interrupted\n")


def test_ctrl_c_leaves_no_half_written_file(folder, tmp_path):
    (tmp_path / "long.txt").write_text("Clara Marsh met Boris Keller at the bridge.\n" * 60_000)
    command = [sys.executable, "-m", "headwise", "scan", folder("llama"), "--text", "long.txt", "--out", "o"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "o").exists():  # made at once, so the work follows
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == ("", "headwise: interrupted\n")
    assert list((tmp_path / "o").iterdir()) == []


# --- the rest -------------------------------------------------------------------------------------------------------


def test_help_papers_and_errors_answer_without_torch():
    code = (
        "import sys\nfrom headwise.cli import run\n"
        "codes = [run(['--help']), run(['papers']), run(['papers', 'zero_tuning']), run(['scan', '--nope'])]\n"
        "print(codes, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[0, 0, 0, 2] []"
    assert "reproduce" in done.stdout


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "headwise", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __import__("headwise").__version__


def test_a_reader_that_stops_reading_is_no_error():
    command = f"{sys.executable} -m headwise papers --json | head -c 10"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_command_shows_the_help(call):
    code, out, err = call()
    assert (code, err) == (0, "")
    assert "Usage: headwise" in out


def test_papers(document, call):
    found = document("papers")
    assert len(found) == 51
    assert all(marked(one) for one in found)
    assert {"slug", "title", "year", "area", "module", "claims", "status"} <= set(found[0])
    one = document("papers", "zero_tuning")
    assert [paper["slug"] for paper in one] == ["zero-tuning"]
    code, out, _ = call("papers", "zero-tuning")
    assert code == 0
    assert "ZeroTuning" in out


def test_reproduce_prints_rows_and_fails_where_a_check_fails(call, monkeypatch, tmp_path):
    def row(name, kind, verdict, known=None):
        return {
            "id": name, "kind": kind, "claim": "It works.", "paper_figure": "1", "measured": "2", "control": None,
            "criterion": "more than 1", "verdict": verdict, "known": known,
        }  # fmt: skip

    rows = [
        row("a", "claim", "reproduced"),
        row("b", "claim", "not reproduced", "too small"),
        row("c", "untestable", None),
    ]
    asked = {}

    def reproduce(*slugs, **options):
        asked.update(options, slugs=slugs)
        return [{"paper": "zero-tuning", "seed": 3, "seconds": 1.0, "claims": rows, "figures": []}]

    monkeypatch.setattr("headwise.papers.running.reproduce", reproduce)
    code, out, _ = call("reproduce", "zero_tuning", "--seed", 3, "--json")
    assert code == 0
    assert json.loads(out)["claims"][0]["verdict"] == "reproduced"
    assert (asked["slugs"], asked["seed"]) == (("zero_tuning",), 3)
    code, out, _ = call("reproduce", "zero-tuning")
    assert "not reproduced: too small" in out
    assert "1 reproduced, 1 not reproduced, 1 untestable" in out
    for failing in (row("d", "check", "not reproduced"), row("d", "claim", "not reproduced")):
        rows.append(failing)
        assert call("reproduce", "zero-tuning")[0] == 1
        rows.pop()


def test_the_list_names_everything(document, call):
    found = document("--list")
    assert marked(found)
    assert {probe["name"] for probe in found["probes"]} >= {"sink", "induction", "induction-repeat"}
    edits = {edit["name"]: edit for edit in found["edits"]}
    gamma = next(p for p in edits["zero-tuning"]["parameters"] if p["name"] == "gamma")
    assert (gamma["default"], gamma["required"]) == (1.6, False)
    assert {"first", "image"} <= {group["form"] for group in found["groups"]}
    assert "text" in {specimen["name"] for specimen in found["specimens"]}
    code, out, _ = call("scan", "--list")
    assert code == 0
    assert "zero-tuning" in out
    assert "spans:A-B" in out


def test_the_doctor(document, call):
    found = document("doctor")
    assert marked(found)
    assert found["versions"]["torch"] == torch.__version__
    assert found["kernel"]["error"] < 1e-5
    assert found["kernel"]["why"]
    said = call("doctor")[1]
    assert "fused" in said
    for name, extra in (("datasets", "data"), ("pyarrow", "data"), ("ray", "ray")):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
        assert found["optional"][name]["version"] == version
        assert found["optional"][name]["extra"] == extra
        (line,) = (line for line in said.splitlines() if line.split()[:1] == [name])
        assert (version or f"not installed (extra: {extra})") in line


def test_training_writes_a_specimen(document, tmp_path):
    found = document("train", "planted", "--out", "made")
    assert marked(found)
    assert found["specimen"] == "planted"
    assert {"model.safetensors", "card.json", "heads.json"} <= {Path(path).name for path in found["files"]}
    assert set(found) >= {"seconds", "metrics"}
    again = document("scan", "made", "--probe", "sink")
    assert again["probes"]["sink"]["1.1"] > 0.99
    assert json.loads(Path("made/heads.json").read_text())["probes"]["sink"] == again["probes"]["sink"]


def test_benchmarks_come_from_the_registry(document, call, monkeypatch):
    import benchmarks

    rows = [
        {
            "name": "attend",
            "input": "512",
            "variant": v,
            "median_ratio": r,
            "spread": 0.0,
            "peak_ratio": None,
            "skipped": s,
        }
        for v, r, s in (("plain", 1.0, None), ("rival", None, "not installed"))
    ]
    monkeypatch.setattr(benchmarks, "run", lambda *_, **__: {"machine": {}, "versions": {}, "rows": rows})
    found = document("bench", "attend")
    assert marked(found)
    assert found["rows"] == rows
    assert "skipped: not installed" in call("bench")[1]


def test_benchmarks_list_their_inputs(document, call):
    assert {"kv", "steering"} <= set(document("bench", "--list")["benchmarks"])
    found = document("bench", "kv", "steering", "--list")
    assert marked(found)
    assert list(found["inputs"]) == ["kv", "steering"] and "32,768 tokens" in found["inputs"]["kv"]
    assert call("bench", "kv", "--list")[1].splitlines() == found["inputs"]["kv"]


def test_offline_stays_offline():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
