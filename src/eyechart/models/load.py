"""``eyechart.load``: from a name to a TransformerBridge, or to a reason why not."""

import contextlib
import difflib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from eyechart.errors import DownloadError, UnknownModelError, UnsupportedModelError, UsageError
from eyechart.models.catalogue import CATALOGUE, DEFAULT_MODEL
from eyechart.models.facts import check_finite, check_structure
from eyechart.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    device_map: str | dict[str, str | int] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> "TransformerBridge":
    """Open a decoder-only language model as a TransformerBridge, raw weights, ready to measure.

    Weights are neither folded nor centred: norms, value norms and massive activations are those of
    the published model.

    Args:
        name: A name of the catalogue (``eyechart models`` lists it), a folder in Hugging Face
            format, a ``.gguf`` file, or a name on the Hugging Face hub.
        device: ``"auto"`` takes the GPU if there is one, else the CPU; or ``"cpu"``, ``"cuda"``,
            ``"cuda:1"``, ``"mps"``.
        dtype: ``"float32"``, ``"float64"``, ``"bfloat16"`` or ``"float16"``. Measurements are
            taken in float32 at least; a half format here is for models that would not fit.
        device_map: Spread a model over several devices, as in transformers (``"auto"``, or a
            mapping); excludes ``device``.
        trust_remote_code: Run modelling code that comes with the model. Off unless asked.
        revision: Branch, tag or commit on the hub.

    Returns:
        The model in evaluation mode.

    Raises:
        UnknownModelError: nothing goes by that name; near names are listed.
        UsageError: no such device, number format or readable file.
        DownloadError: the files could not be fetched and are not cached.
        UnsupportedModelError: not causal, without attention, or unknown to TransformerLens.
        NonFiniteError: NaN or infinity in the weights; names the layer.
    """
    number_format = parse_dtype(dtype)
    if device_map is not None and device != "auto":
        raise UsageError("device and device_map exclude each other: give one of them")
    target = None if device_map is not None else parse_device(device)
    name = os.fspath(name)
    if name in CATALOGUE:
        source = os.fspath(CATALOGUE[name].folder())
    elif name.endswith(".gguf"):
        return _open_gguf(Path(name), target, number_format, device_map, trust_remote_code)
    elif Path(name).expanduser().exists() or name.startswith((".", "~", os.sep)):
        source = os.fspath(_checked_folder(Path(name).expanduser()))
    else:
        source = _from_hub(name, revision)
    _check_config(name, source, revision, trust_remote_code)
    model = _boot(
        source,
        device=target,
        dtype=number_format,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    return _ready(model, name)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A number format by name.

    Raises:
        UsageError: not a format models can be run in.
    """
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise UsageError(f"unknown dtype {str(dtype)!r}; choose one of {', '.join(DTYPES)}")
    return found


def parse_device(device: str) -> str:
    """A device that is there; ``"auto"`` is the GPU if there is one.

    Raises:
        UsageError: no such device on this machine.
    """
    mps = torch.backends.mps.is_available()
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        parsed = torch.device(device)
    except RuntimeError as problem:
        raise UsageError(
            f"unknown device {device!r}; try auto, cpu, cuda, cuda:0 or mps"
        ) from problem
    count = torch.cuda.device_count() if parsed.type == "cuda" else 0
    if parsed.type == "cuda" and (parsed.index or 0) >= count:
        raise UsageError(
            f"device {device!r} asked for, but torch sees {count} CUDA devices here. "
            "Use device='cpu', or install a CUDA build of torch on a machine with a GPU."
        )
    if parsed.type == "mps" and not mps:
        raise UsageError("device 'mps' asked for, but this machine has none. Use device='cpu'.")
    if parsed.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"device {device!r} is not supported; try auto, cpu, cuda or mps")
    return device


def _boot(source: str, **options: Any) -> "TransformerBridge":
    from transformer_lens.model_bridge import TransformerBridge

    try:
        # A download from the hub may take long: its progress is for the user to see.
        quiet = quiet_transformers() if Path(source).is_dir() else contextlib.nullcontext()
        with quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return TransformerBridge.boot_transformers(source, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, NotImplementedError, SafetensorError) as problem:
        first_line = str(problem).strip().splitlines()[0][:300] if str(problem) else repr(problem)
        raise UnsupportedModelError(
            f"{source} could not be opened as a TransformerBridge: {first_line}"
        ) from problem


def _ready(model: "TransformerBridge", name: str) -> "TransformerBridge":
    # The folder of a catalogue entry is nobody's idea of the model's name.
    model.cfg.model_name = name
    check_structure(model)
    check_finite(model)
    model.eval()
    return model


def _open_gguf(
    path: Path,
    device: str | None,
    dtype: torch.dtype,
    device_map: str | dict[str, str | int] | None,
    trust_remote_code: bool,
) -> "TransformerBridge":
    from eyechart.models.convert import open_gguf

    path = path.expanduser()
    if not path.is_file():
        raise UnknownModelError(f"no file {str(path)!r}")
    hf_model, tokenizer = open_gguf(path, dtype, device_map, trust_remote_code)
    _refuse_by_config(path.name, hf_model.config)
    if device is not None:
        hf_model = hf_model.to(device)
    model = _boot(path.stem, hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=dtype)
    return _ready(model, path.stem)


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise UnknownModelError(
            f"{str(folder)!r} is not a model folder: it has no config.json. "
            "Give a folder as written by save_pretrained, or a .gguf file."
        )
    return folder


def _from_hub(name: str, revision: str | None) -> str:
    """The name itself if the hub has it, else the folder of a copy in the hub's cache.

    One quick question first, because transformers retries an absent network for long, file by file.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        HfApi().model_info(name, revision=revision, timeout=10)
        return name
    except GatedRepoError as problem:
        raise DownloadError(
            f"{name} is gated: accept its licence on the hub and set HF_TOKEN, then try again."
        ) from problem
    except RevisionNotFoundError as problem:
        raise UsageError(f"{name} has no revision {revision!r} on the hub") from problem
    except (RepositoryNotFoundError, HFValidationError) as problem:
        raise UnknownModelError(f"no model is called {name!r}. {_near(name)}") from problem
    except Exception as problem:  # whatever the HTTP library of the day raises
        with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
            return snapshot_download(name, revision=revision, local_files_only=True)
        if "/" not in name:
            raise UnknownModelError(
                f"{name!r} is not in the catalogue, and the hub cannot be asked "
                f"(no network?). {_near(name)}"
            ) from problem
        raise DownloadError(
            f"{name} is not cached, and the hub cannot be reached ({type(problem).__name__}). "
            f"Check the network, or choose a model that needs no hub. {_near(name)}"
        ) from problem


def _near(name: str) -> str:
    from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

    known = [*CATALOGUE, *OFFICIAL_MODEL_NAMES]
    near = difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.6)
    listed = "`eyechart models` lists what needs no hub."
    return f"Did you mean {', '.join(near)}? {listed}" if near else listed


def _check_config(name: str, source: str, revision: str | None, trust_remote_code: bool) -> None:
    """Refuse by the configuration alone, before weights are fetched or read."""
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                source, revision=revision, trust_remote_code=trust_remote_code
            )
    except ValueError as problem:
        if "trust_remote_code" in str(problem):
            raise UsageError(
                f"{name} comes with its own modelling code. Read it, and if you trust it pass "
                "trust_remote_code=True (--trust-remote-code on the command line)."
            ) from problem
        raise UnsupportedModelError(
            f"{name}: transformers cannot read its configuration: {problem}"
        ) from problem
    except OSError as problem:
        raise DownloadError(f"{name}: its configuration cannot be read: {problem}") from problem
    _refuse_by_config(name, config)


def _refuse_by_config(name: str, config: Any) -> None:
    from transformer_lens.utilities.architectures import classify_architecture
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    architectures = getattr(config, "architectures", None) or [type(config).__name__]
    kind = classify_architecture(architectures[0])
    bidirectional = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )
    if kind == "masked_lm" or bidirectional:
        raise UnsupportedModelError(
            f"{name} ({architectures[0]}) is not causal: it reads text in both directions. "
            "eyechart examines decoder-only language models."
        )
    if kind == "seq2seq" or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} ({architectures[0]}) is an encoder-decoder; "
            "eyechart examines decoder-only language models."
        )
    if kind in ("audio", "vision"):
        raise UnsupportedModelError(f"{name} ({architectures[0]}) is no language model ({kind}).")
