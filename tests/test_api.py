"""What `import headwise` shows, used from Python: scans of models and texts, comparisons, saved edits."""

import json
from pathlib import Path

import pytest
import torch
from tests.folders import save_model, small_tokenizer
from tests.zoo import FAMILIES

import headwise as hw
from headwise._texts import Text, batches, read_text, windows
from headwise.attend.edits import Ablate, BiasGroup
from headwise.attend.groups import first_token
from headwise.attend.probes import Sink
from headwise.attend.read import Probe
from headwise.errors import InputError, UnsupportedModel
from headwise.specimens.registry import load_specimen
from headwise.steering.zero_tuning import ZeroTuning


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, tokenizer):
    return hw.load(save_model("llama", tmp_path_factory.mktemp("llama"), tokenizer))


# --- scans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["planted", "planted-llama"])
def test_a_scan_finds_the_planted_heads(name):
    specimen = load_specimen(name)
    found = hw.scan(specimen.model, specimen.tokenizer)
    for probe in ("previous", "duplicate", "induction", "sink", "dormant", "induction-repeat"):
        role = {"induction-repeat": "induction", "dormant": "sink"}.get(probe, probe)
        (best,) = found.top(probe, 1)
        assert str(best) == specimen.card["heads"][role], probe
    assert any("does not know the shipped page" in note for note in found.notes)
    assert "random words" in found.source


def test_scores_are_means_over_the_rows_of_all_windows(loaded):
    """Two texts of different length, read in one padded batch, against each read by itself."""
    ids = [[0, 5, 9, 5, 9, 12, 7], [0, 31, 8, 31]]
    sums, rows = torch.zeros(2, 4), 0
    for row in ids:
        maps = hw.attention_maps(loaded.model, torch.tensor([row]))[0].view(2, 4, len(row), len(row))
        sums += maps[:, :, 1:, 0].sum(-1)
        rows += len(row) - 1
    words = [loaded.tokenizer.decode(row[1:]) for row in ids]
    again = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in words]
    assert again == [row[1:] for row in ids], "the tokens must survive the way through text"
    found = hw.scan(loaded.model, loaded.tokenizer, probes="sink", text=words)
    torch.testing.assert_close(found.tensor("sink").float(), sums / rows, atol=1e-6, rtol=0)


def test_batches_and_windows_do_not_change_whole_texts(loaded):
    texts = ["Boris Keller met Clara.", "Clara Marsh", "On Sunday Boris told Clara a story"]
    one = hw.scan(loaded.model, loaded.tokenizer, probes=["sink", "entropy"], text=texts, batch_tokens=4096)
    two = hw.scan(loaded.model, loaded.tokenizer, probes=["sink", "entropy"], text=texts, batch_tokens=8)
    for probe in one.probes:
        torch.testing.assert_close(one.tensor(probe), two.tensor(probe), atol=1e-5, rtol=0)


def test_token_ids_need_no_tokenizer():
    model = FAMILIES["gpt2"].build()
    found = hw.scan(model, text=torch.arange(8, 40).view(2, 16), probes=["sink", "previous"])
    assert found.source == "given token ids, 32 tokens"
    assert found.texts[0]["tokens"][0] == "8"
    with pytest.raises(InputError, match="has no tokenizer"):
        hw.scan(model)
    with pytest.raises(InputError, match="knows 0 to 63"):
        hw.scan(model, text=torch.full((1, 4), 64))


@pytest.mark.parametrize("name", ["albert", "clip", "deepseek_v3", "gpt_oss", "qwen2_5_vl", "qwen3_next", "t5"])
def test_models_of_every_shape_are_read(name):
    found = hw.scan(FAMILIES[name].build(), text=torch.arange(8, 48).view(2, 20))
    read = {head.tower for head, score in found.of("sink").items() if score is not None}
    assert read == {"clip": {"text"}, "t5": {"decoder", "encoder", "cross"}}.get(name, {""})
    unread = {tower.name for tower in found.layout.towers} - read
    assert all(any(f"The {tower} tower was not read" in note for note in found.notes) for tower in unread)
    assert bool(found.examples) != any("is not shown" in note for note in found.notes)


def test_probes_by_name_class_and_object(loaded):
    class Mine(Probe):
        name = "mine"
        sentence = "How much."

        def sparse(self, reading):
            self.add(reading, reading.mass(reading.first_column[:, None]).sum((0, 2)), reading.rows.sum())

    found = hw.scan(loaded.model, loaded.tokenizer, probes=["previous", Sink, Mine()], text="Clara Marsh and Boris")
    assert found.probes == ["previous", "sink", "mine"]
    with pytest.raises(InputError, match="did you mean 'previous'"):
        hw.scan(loaded.model, loaded.tokenizer, probes="previus")
    with pytest.raises(InputError, match="none was named"):
        hw.scan(loaded.model, loaded.tokenizer, probes=[])


def test_rows_are_sampled_above_2048_tokens_unless_all_are_asked_for():
    model = FAMILIES["t5"].build()  # no longest text
    encoder = model.get_encoder()
    ids = torch.randint(8, 64, (1, 2304), generator=torch.Generator().manual_seed(0))
    some = hw.scan(encoder, text=ids, probes="entropy")
    every = hw.scan(encoder, text=ids, probes="entropy", rows="all")
    assert any("sample of 512 rows" in note for note in some.notes)
    assert every.notes == []
    a, b = some.tensor("entropy"), every.tensor("entropy")
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, atol=0.02, rtol=0)


def test_progress_is_told_and_the_model_left_as_it_was(loaded):
    seen = []
    loaded.model.train()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loaded.model.config, "attention_dropout", 0.5)
            hw.scan(loaded.model, loaded.tokenizer, probes="sink", progress=lambda *told: seen.append(told))
        assert loaded.model.training
    finally:
        loaded.model.eval()
    reading = [told for told in seen if told[2] == "reading"]
    assert reading[0][0] == 0
    assert reading[-1][0] == reading[-1][1] > 1000
    assert loaded.model.config._attn_implementation == "sdpa"


def test_models_that_cannot_be_scanned_are_refused(tokenizer):
    with pytest.raises(UnsupportedModel, match="GPTNeoForCausalLM"):
        from tests.zoo import OFF_INTERFACE

        hw.scan(OFF_INTERFACE["gpt_neo"](), tokenizer)
    with pytest.raises(InputError, match="listens to audio"):
        hw.scan(FAMILIES["whisper"].build(), tokenizer)
    with pytest.raises(InputError, match="reads pictures"):
        hw.scan(FAMILIES["vit"].build())
    with pytest.raises(InputError, match="the tokenizer that belongs to the model"):
        hw.scan(FAMILIES["llama"].build(), tokenizer)


def test_a_scan_can_be_written_and_read_again(loaded, tmp_path):
    found = hw.scan(
        loaded.model, loaded.tokenizer, text="<script>alert(1)</script> Clara & Boris", probes="sink,previous"
    )
    files = found.write(tmp_path / "out")
    assert set(files) == {"heads.json", "heads.csv", "heads.png", "report.html"}
    again = hw.HeadMap.load(files["heads.json"])
    assert again.scores == found.scores
    assert "<script>alert" not in files["report.html"].read_text(encoding="utf-8")
    assert "".join(found.texts[0]["tokens"][1:]) == "<script>alert(1)</script> Clara & Boris"
    assert found.texts[0]["special"] == [0]
    heads = {example["head"] for example in found.examples}
    assert {str(head) for head in found.top("sink", 3)} <= heads
    example = next(e for e in found.examples if e["head"] == str(found.top("sink", 1)[0]))
    (query, pairs), maps = example["rows"][-1], hw.attention_maps(loaded.model, _ids(loaded, found), example["head"])
    assert query == len(found.texts[0]["tokens"]) - 1
    for key, weight in pairs:
        assert weight == pytest.approx(float(maps[0, 0, -1, key]), abs=1e-5)


def _ids(loaded, found) -> torch.Tensor:
    text = "".join(found.texts[0]["tokens"][1:])
    return torch.tensor([[0, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]])


def test_a_selection_of_a_scan_is_the_heads_of_an_edit(loaded):
    found = hw.scan(loaded.model, loaded.tokenizer, probes="sink", text="Clara Marsh and Boris Keller")
    ids = torch.tensor([[0, 5, 9, 12]])
    with torch.no_grad():
        plain = loaded.model(ids).logits
        with hw.steer(loaded.model, ZeroTuning(gamma=3.0, heads=found.top("sink", 2))):
            steered = loaded.model(ids).logits
        with hw.steer(loaded.model, ZeroTuning(gamma=3.0, heads="top:sink:2"), scores=found.of):
            assert torch.equal(loaded.model(ids).logits, steered)
        assert torch.equal(loaded.model(ids).logits, plain)
    assert not torch.equal(steered, plain)


# --- comparing ------------------------------------------------------------------------------------------------------


def test_comparing_maps(loaded, tmp_path):
    one = hw.scan(loaded.model, loaded.tokenizer, probes="sink,previous", text="Clara Marsh and Boris")
    same = hw.compare(one, one)["probes"]["sink"]
    assert (same["correlation"], same["overlap"], same["k"]) == (1.0, 1.0, 2)
    assert set(same["scores"].values()) == {0.0}
    one.save(tmp_path / "heads.json")
    assert hw.compare(one, tmp_path / "heads.json")["probes"].keys() == {"sink", "previous"}
    other = load_specimen("planted")
    planted = hw.scan(other.model, other.tokenizer, probes="sink")
    with pytest.raises(InputError, match="2 layers of up to 4 heads but planted has 2 layers of up to 2"):
        hw.compare(one, hw.HeadMap(planted.scores, planted.layout, model="planted"))
    lone = hw.HeadMap({"entropy": one.of("sink")}, one.layout)
    with pytest.raises(InputError, match="no probe in common"):
        hw.compare(one, lone)


# --- texts ----------------------------------------------------------------------------------------------------------


def test_windows_start_with_one_beginning_of_text(tokenizer):
    text = Text("t", ["Clara Marsh and Boris Keller met on the night train to Porto. " * 5, "Hugo"])
    found = windows(text, tokenizer, 32, causal=True)
    assert all(window.ids[0] == 0 and window.ids.count(0) == 1 for window in found)
    assert all(len(window.ids) <= 32 for window in found)
    joined = "".join(piece for window in found[:-1] for piece in window.pieces[1:])
    assert joined == text.documents[0], "every character once, in order"
    assert found[-1].pieces == ["<s>", "Hugo"] or "".join(found[-1].pieces[1:]) == "Hugo"
    assert all(len(window.ids) == len(window.pieces) for window in found)


def test_a_beginning_that_the_tokenizer_adds_is_not_doubled():
    planted = load_specimen("planted").tokenizer
    (window,) = windows(Text("t", ["Ann Ben Ann"]), planted, 64, causal=True)
    assert window.ids == planted("Ann Ben Ann")["input_ids"]
    assert window.special == (1, 0)


def test_characters_of_several_tokens_are_shown_once(tokenizer):
    (window,) = windows(Text("t", ["a → 数 b"]), tokenizer, 64, causal=True)
    assert "".join(window.pieces[1:]) == "a → 数 b"


def test_batches_keep_to_the_budget_and_pad_on_the_right(tokenizer):
    texts = [" ".join(["Clara"] * n) for n in (3, 30, 4, 28, 5)]
    found = windows(Text("t", texts), tokenizer, 64, causal=True)
    made = list(batches(found, 64, pad=2))
    assert sum(len(batch.ids) for batch in made) == 5
    for batch in made:
        assert batch.ids.numel() <= 64
        if batch.mask is not None:
            assert bool((batch.ids[batch.mask == 0] == 2).all())
            assert bool((batch.mask[:, 0] == 1).all())
    assert sum(batch.tokens for batch in made) == sum(len(window.ids) for window in found)


def test_jsonl_and_files(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "one"}\n\n"two"\n{"content": "three", "id": 4}\n', encoding="utf-8")
    assert read_text(path) == Text("t.jsonl", ["one", "two", "three"])
    plain = tmp_path / "t.txt"
    plain.write_bytes("\ufeffone\r\ntwo".encode())
    assert read_text(plain).documents == ["one\ntwo"]
    wide = tmp_path / "wide.txt"
    wide.write_text("wide", encoding="utf-16")
    assert read_text(wide).documents == ["wide"]
    assert read_text(["a", " "]).documents == ["a"]
    with pytest.raises(InputError, match=r"is a file; give pathlib\.Path"):
        read_text(str(plain))
    with pytest.raises(InputError, match="is empty"):
        read_text("  ")
    with pytest.raises(InputError, match="line 2: is not JSON"):
        path.write_text('"fine"\n{"text": \n')
        read_text(path)


# --- edits ----------------------------------------------------------------------------------------------------------


def test_methods_are_saved_and_loaded_by_name(tmp_path):
    edits = [ZeroTuning(gamma=0.3, heads="0.*"), BiasGroup(first_token(), 2.0), Ablate(heads=[hw.Head(1, 2)])]
    hw.save_edits(edits, str(tmp_path / "edits.json"))
    again = hw.load_edits(tmp_path / "edits.json")
    assert [type(edit) for edit in again] == [type(edit) for edit in edits]
    assert again[0] == edits[0]
    assert again[1] == edits[1]
    assert json.loads((tmp_path / "edits.json").read_text())["schema"] == 1


def test_training_from_python(tmp_path):
    made = hw.train("planted", tmp_path / "planted")
    assert isinstance(made, Path)
    assert hw.load(made).model.config.n_layer == 2
