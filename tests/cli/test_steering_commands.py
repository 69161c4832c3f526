"""`generate`, `sweep` and `export`, on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import lapefast as lf
from lapefast import demo
from lapefast.cli import main
from lapefast.cli.edits import build_edit
from lapefast.neurons import NeuronSets, load_edits
from lapefast.neurons.layout import Layout

ALIKE = ["--threads", 1]
PROMPTS = ["Kenya, Yemen", "11 minutes:"]


@pytest.fixture(scope="module")
def files(made, tmp_path_factory):
    """A profile of three labels, by the command, and neurons of each; a fourth has none."""
    directory = tmp_path_factory.mktemp("files")
    corpora = [f"--corpus={label}={made.train[label]}" for label in ("en", "zh", "fr")]
    command = ["profile", made.directory, *corpora, "--seq-len", 32, "--max-tokens", 512]
    with pytest.raises(SystemExit) as exit_:
        main([str(one) for one in (*command, *ALIKE, "-o", directory / "profile")])
    assert exit_.value.code == 0
    layout = Layout(()).bind(made.model)
    generator = torch.Generator().manual_seed(0)
    sets = {
        label: {site: torch.randperm(64, generator=generator)[:20] for site in layout.sites}
        for label in ("en", "zh", "fr")
    }
    NeuronSets({**sets, "none": {}}, layout).save(directory / "neurons.json")
    return directory


@pytest.fixture(autouse=True)
def _threads():
    """Commands set torch's threads for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def model_of(made, files):
    return [made.directory, "--neurons", files / "neurons.json"]


def refused(result, *said: str) -> None:
    assert result.code == 2
    assert result.err.count("error: ") == 1
    for words in said:
        assert words in result.err


def continued(made, edit, prompt: str, count: int, where="all") -> list[int]:
    ids = made.tokenizer(prompt, return_tensors="pt").input_ids
    with lf.steer(made.model, edit, where), torch.no_grad():
        new = made.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )
    return new[0, ids.shape[1] :].tolist()


def test_generate_continues_with_the_edit_of_its_options(lapefast, made, files, tmp_path):
    output = tmp_path / "texts.jsonl"
    result = lapefast(
        *("generate", *model_of(made, files), "--profile", files / "profile", "-o", output),
        *("--activate", "zh", "--deactivate", "en", "--scale", "fr=3", "--max-new-tokens", 8),
        *("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--compare", *ALIKE),
    )
    assert result.code == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    sets, profile = NeuronSets.load(files / "neurons.json"), lf.Profile.load(files / "profile")
    edit = lf.deactivate(sets["en"]) | lf.scale(sets["fr"], 3.0)
    edit = edit | lf.activate(sets["zh"], profile.means("zh"))
    for row in rows:
        assert row["tokens"] == continued(made, edit, row["prompt"], 8)
        assert row["text"] == made.tokenizer.decode(row["tokens"], skip_special_tokens=True)
        plain = continued(made, lf.scale(sets["en"], 1.0), row["prompt"], 8)
        assert row["unedited"] == made.tokenizer.decode(plain, skip_special_tokens=True)
        assert f"prompt: {row['prompt']}" in result.out
    assert result.out.count("unedited: ") == 2


@pytest.mark.parametrize("where", ["prompt", "generated"])
def test_generate_edits_where_it_is_told_to(where, lapefast, made, files, tmp_path):
    output = tmp_path / "texts.jsonl"
    result = lapefast(
        *("generate", *model_of(made, files), "-o", output, "--scale", "zh=-300", "--where", where),
        *("--max-new-tokens", 8, "--prompt", PROMPTS[0], *ALIKE),
    )
    assert result.code == 0
    (row,) = (json.loads(line) for line in output.read_text().splitlines())
    edit = lf.scale(NeuronSets.load(files / "neurons.json")["zh"], -300.0)
    assert row["tokens"] == continued(made, edit, PROMPTS[0], 8, where)
    others = {"all", "prompt", "generated"} - {where}
    assert all(row["tokens"] != continued(made, edit, PROMPTS[0], 8, one) for one in others)


def test_of_two_edits_of_a_neuron_the_order_of_options_does_not_decide(files, tmp_path):
    """But this one: deactivate, scale, add, activate."""
    sets, profile = NeuronSets.load(files / "neurons.json"), lf.Profile.load(files / "profile")
    neurons, labels = sets["en"], ("en", "zh", "fr")
    NeuronSets(dict.fromkeys(labels, neurons), sets.layout).save(tmp_path / "alike.json")
    steps = {
        "deactivate": (["en"], lf.deactivate(neurons)),
        "scale": (["fr=3"], lf.scale(neurons, 3.0)),
        "add": (["fr"], lf.add(neurons, profile.means("fr"), 2.0)),
        "activate": (["zh"], lf.activate(neurons, profile.means("zh"))),
    }
    for later in range(1, len(steps)):
        names = list(steps)[: later + 1]
        given = [steps[name][0] if name in names else None for name in steps]
        edit = build_edit(tmp_path / "alike.json", None, files / "profile", *given, 2.0)
        expected = steps[names[-1]][1]
        for site, table in expected.tables.items():
            assert all(map(torch.equal, edit.tables[site], table)), names


def test_generate_adds_means_times_a_strength(lapefast, made, files, tmp_path):
    output = tmp_path / "texts.jsonl"
    result = lapefast(
        *("generate", *model_of(made, files), "--profile", files / "profile", "-o", output),
        *("--add", "fr", "--strength", 30, "--max-new-tokens", 8, "--prompt", PROMPTS[0], *ALIKE),
    )
    assert result.code == 0
    sets, profile = NeuronSets.load(files / "neurons.json"), lf.Profile.load(files / "profile")
    edit = lf.add(sets["fr"], profile.means("fr"), 30.0)
    (row,) = (json.loads(line) for line in output.read_text().splitlines())
    assert row["tokens"] == continued(made, edit, PROMPTS[0], 8)
    assert "unedited" not in row


def test_generate_reads_prompts_from_a_file_and_draws_tokens_by_the_seed(
    lapefast, made, files, tmp_path
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in PROMPTS))
    said = []
    for seed in (0, 0, 1):
        result = lapefast(
            *("generate", *model_of(made, files), "--prompts", prompts, "--deactivate", "en"),
            *("--sample", "--temperature", 1.5, "--max-new-tokens", 12, "--seed", seed, *ALIKE),
        )
        assert result.code == 0
        said.append(result.out)
    assert said[0] == said[1] != said[2]


def test_generate_speaks_the_models_chat_format(lapefast, made, files, tmp_path):
    model, output = tmp_path / "chat", tmp_path / "texts.jsonl"
    made.model.save_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.directory)
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer.save_pretrained(model)
    options = ["--deactivate", "en", "--prompt", "Kenya", "--max-new-tokens", 8, *ALIKE]
    command = ["generate", model, "--neurons", files / "neurons.json", *options]
    assert lapefast(*command, "--chat", "-o", output).code == 0
    (row,) = (json.loads(line) for line in output.read_text().splitlines())
    edit = lf.deactivate(NeuronSets.load(files / "neurons.json")["en"])
    assert row["tokens"] == continued(made, edit, "[Kenya]", 8)
    refused(lapefast("generate", *model_of(made, files), *options, "--chat"), "no chat template")


def test_sweep_writes_generations_and_prints_a_summary(lapefast, made, files, tmp_path):
    output, prompts = tmp_path / "sweep.jsonl", tmp_path / "prompts.jsonl"
    # The demo's own are long for a vocabulary as small as this one's.
    given = [(label, text[:6]) for label in ("en", "zh") for text in demo.prompts(3)[label]]
    prompts.write_text("\n".join(json.dumps({"label": a, "prompt": b}) for a, b in given))
    corpora = [f"--corpus={label}={made.train[label]}" for label in ("en", "zh", "fr")]
    result = lapefast(
        *("sweep", *model_of(made, files), "--profile", files / "profile", "-o", output),
        *("--prompts", prompts, "--labels", "en,zh,fr", "--pair", "en=zh", "--pair", "zh=zh"),
        *("--random-sets", 1, "--where", "generated", "--strength", 2.5),
        *("--max-new-tokens", 4, *corpora, "--seq-len", 32, "--max-tokens", 512, *ALIKE),
    )
    assert result.code == 0
    about, *rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert about["metadata"]["prompts_source"] == "prompts.jsonl"
    assert about["metadata"]["strength"] == 2.5
    assert about["metadata"]["where"] == "generated"
    shown = lapefast("info", output)
    assert "prompts.jsonl" in shown.out
    assert "diffmean" in shown.out
    each = 3
    count = {kind: sum(row["kind"] == kind for row in rows) for kind in ("edited", "unedited")}
    assert count == {"edited": 2 * each, "unedited": 2 * each}
    assert len(rows) == (2 + 3 * 2) * each
    assert all(column in result.out for column in ("source", "overlap", "diffmean", "ppl edited"))


def test_sweep_has_prompts_of_its_own(lapefast, made, files, tmp_path, monkeypatch):
    given = []

    def sweep(model, neurons, profile, prompts, *args, **options):
        given.append(prompts)
        raise lf.InputError("seen")

    monkeypatch.setattr("lapefast.evaluate.sweep", sweep)
    command = ["sweep", *model_of(made, files), "--profile", files / "profile", "--pair", "en=zh"]
    refused(lapefast(*command, "-o", tmp_path / "sweep.jsonl"), "seen")
    assert given == [demo.prompts()]


def test_sweep_takes_prompts_and_languages_of_labels_of_any_name(lapefast, made, files, tmp_path):
    sets = NeuronSets.load(files / "neurons.json")
    renamed = NeuronSets({"english": sets["en"]}, sets.layout)
    renamed.save(tmp_path / "n.json")
    profile = lf.profile(
        made.model, {"english": made.train["en"]}, made.tokenizer, seq_len=32, max_tokens=512
    )
    profile.save(tmp_path / "profile")
    (tmp_path / "prompts").write_text(json.dumps({"label": "english", "prompt": "Kenya"}))
    command = ["sweep", made.directory, "--neurons", tmp_path / "n.json", "--profile"]
    command += [tmp_path / "profile", "-o", tmp_path / "sweep.jsonl", "--random-sets", 0, *ALIKE]
    command += ["--max-new-tokens", 4]
    refused(lapefast(*command), "none of label 'english'", "--prompts")
    command += ["--prompts", tmp_path / "prompts"]
    refused(lapefast(*command), "'english' is no language")
    assert not (tmp_path / "sweep.jsonl").exists()
    assert lapefast(*command, "--language", "english=en", "--any-language").code == 0
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == 1 + 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--strength", 2], "--strength is for DiffMean, which reads texts; give --corpus too"),
        (["--shift-layer", 1], "--shift-layer is for DiffMean"),
        (["--seq-len", 32], "--seq-len is for DiffMean"),
        (["--max-tokens", 32], "--max-tokens is for DiffMean"),
        (["--document", "file"], "--document is for DiffMean"),
        (["--field", "body"], "--field is for DiffMean"),
        (["--no-special-tokens"], "--no-special-tokens is for DiffMean"),
        (["--language", "en=klingon"], "the code 'klingon' of label 'en' is of no language"),
        (["--language", "ja=ja"], "says what 'ja' is, but the labels are en, zh"),
        (["--language", "en=en", "--language", "en=fr"], "says that 'en' is en and that it is fr"),
    ],
)
def test_sweep_refuses_options_that_would_do_nothing(
    lapefast, made, files, tmp_path, monkeypatch, options, said
):
    monkeypatch.setattr("lapefast.engines.transformers.load_model", None)
    command = ["sweep", *model_of(made, files), "--profile", files / "profile", "--pair", "en=zh"]
    refused(lapefast(*command, *options, "-o", tmp_path / "sweep.jsonl"), said)
    assert not list(tmp_path.iterdir())


def test_sweep_refuses_a_label_without_neurons(lapefast, made, files, tmp_path):
    (tmp_path / "prompts").write_text(json.dumps({"label": "none", "prompt": "Kenya"}))
    result = lapefast(
        *("sweep", *model_of(made, files), "--profile", files / "profile", "--pair", "none=none"),
        *("--prompts", tmp_path / "prompts", "-o", tmp_path / "sweep.jsonl"),
    )
    refused(result, "'none' has no neurons")
    assert [one.name for one in tmp_path.iterdir()] == ["prompts"]


def test_export_writes_a_file_of_edits(lapefast, made, files, tmp_path):
    output = tmp_path / "edits.json"
    command = ["export", *model_of(made, files), "--format", "edits", "-o", output, "--deactivate"]
    assert lapefast(*command, "en", "--name", "quiet", "--for-all").code == 0
    named = load_edits(output)
    expected = lf.deactivate(NeuronSets.load(files / "neurons.json")["en"])
    assert named.server == "quiet"
    for site, (neurons, scale, shift) in named.edits["quiet"].tables.items():
        assert torch.equal(neurons, expected.tables[site][0])
        assert not scale.any()
        assert not shift.any()


def test_export_writes_a_checkpoint_that_is_the_edited_model(lapefast, made, files, tmp_path):
    output = tmp_path / "quiet"
    command = ["export", *model_of(made, files), "--format", "checkpoint", "-o", output]
    assert lapefast(*command, "--deactivate", "en").code == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    assert torch.equal(ids, made.tokenizer(PROMPTS[0], return_tensors="pt").input_ids)
    edit = lf.deactivate(NeuronSets.load(files / "neurons.json")["en"])
    with torch.no_grad():
        with lf.fold(made.model, edit):
            expected = made.model(ids).logits
        assert torch.equal(model(ids).logits, expected)
        assert not torch.equal(made.model(ids).logits, expected)


def test_export_writes_an_adapter(lapefast, made, files, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed; the extra export lifts it")
    output = tmp_path / "adapter"
    command = ["export", *model_of(made, files), "--format", "lora", "-o", output]
    refused(lapefast(*command, "--deactivate", "en", "--max-rank", 3), "3")
    assert not output.exists()
    assert lapefast(*command, "--deactivate", "en").code == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(made.directory)
    ids = made.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    edit = lf.deactivate(NeuronSets.load(files / "neurons.json")["en"])
    with torch.no_grad(), lf.steer(base, edit):
        expected = base(ids).logits
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(base, output)(ids).logits
        unedited = made.model(ids).logits
    # The adapter takes away what was added, in float32: it errs by roundings of products of 64
    # terms, far below what the edit itself changes.
    change = (unedited - expected).abs().max()
    assert (found - expected).abs().max() < 1e-4 * change


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "there is no edit"),
        (["--deactivate", "xx"], "no neurons of label 'xx'; its labels are en, zh, fr, none"),
        (["--deactivate", "none"], "'none' has no neurons"),
        (["--activate", "zh"], "--activate takes means from a profile"),
        (["--add", "zh"], "--add takes means from a profile"),
        (["--scale", "en"], "LABEL=FACTOR"),
        (["--scale", "en=much"], "a number"),
        (["--scale", "en=nan"], "finite"),
        (["--activate", "zh", "--profile", "absent"], "absent: no such file"),
        (["--deactivate", "en", "--labels", "en,vi"], "no label 'vi'"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "export"])
def test_an_edit_that_cannot_be_made_is_refused_before_the_model_is_loaded(
    lapefast, made, files, tmp_path, monkeypatch, command, options, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lapefast.engines.transformers.load_model", None)
    rest = ["--prompt", "Kenya"] if command == "generate" else ["--format", "edits"]
    result = lapefast(command, *model_of(made, files), *rest, *options, "-o", tmp_path / "output")
    refused(result, said)
    assert list(tmp_path.iterdir()) == []


def test_a_profile_of_another_model_is_refused(lapefast, made, files, tmp_path):
    profile = lf.Profile.load(files / "profile")
    profile.metadata["fingerprint"] = "0" * 64
    profile.save(tmp_path / "profile")
    result = lapefast(
        *("generate", *model_of(made, files), "--prompt", "Kenya", "--activate", "zh"),
        *("--profile", tmp_path / "profile"),
    )
    refused(result, "of two models")


@pytest.mark.parametrize(
    ("command", "options", "target"),
    [
        ("generate", ["--deactivate", "en", "--prompt", "x"], "nowhere/x.jsonl"),
        ("generate", ["--deactivate", "en", "--prompt", "x"], "."),
        ("sweep", ["--profile", "p"], "-"),
        ("export", ["--deactivate", "en", "--format", "edits"], "full"),
        ("export", ["--deactivate", "en", "--format", "lora"], "full"),
        ("export", ["--deactivate", "en", "--format", "lora"], "full/file"),
        ("export", ["--deactivate", "en", "--format", "checkpoint"], "nowhere/x"),
        ("export", ["--deactivate", "en", "--format", "checkpoint"], "-"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_work(
    lapefast, made, files, tmp_path, monkeypatch, command, options, target
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lapefast.engines.transformers.load_model", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    refused(lapefast(command, *model_of(made, files), *options, "-o", target), "cannot write")
    assert (tmp_path / "full" / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "there is no prompt"),
        (["--prompt", ""], "there is no prompt"),
        (["--prompts", "absent"], "absent: no such file"),
        (["--prompt", "x", "--sample", "--temperature", 0], "--temperature must be from 0.0001"),
        (["--prompt", "x", "--temperature", 2], "--temperature is for tokens that are drawn"),
        (["--prompt", "x", "--max-new-tokens", 64], "over the model's limit of 64"),
    ],
)
def test_prompts_that_cannot_be_continued(lapefast, made, files, options, said):
    refused(lapefast("generate", *model_of(made, files), "--deactivate", "en", *options), said)


def test_a_name_that_no_edit_may_have(lapefast, made, files, tmp_path):
    command = ["export", *model_of(made, files), "--deactivate", "en", "--format", "edits"]
    refused(lapefast(*command, "--name", "none", "-o", tmp_path / "e.json"), "--name")
    refused(lapefast(*command[:-1], "lora", "--activate", "zh", "-o", tmp_path / "a"), "profile")
