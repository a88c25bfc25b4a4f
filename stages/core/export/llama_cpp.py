"""llama.cpp itself, by the C functions that the package xllamacpp has inside: logits and token ids of a GGUF file.

For `--verify` and the tests. The structures are those of `include/llama.h` at the version that requirements-readers.txt
pins; what this module does not set is the library's own. `library` holds a few of those values against what they should
be, so that of another version it reads no nonsense.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from stages.core.common.errors import StageError

_i32, _u32, _float, _bool, _pointer = ctypes.c_int32, ctypes.c_uint32, ctypes.c_float, ctypes.c_bool, ctypes.c_void_p
F32 = 0
"""The number of the type in ggml."""
THREADS = 2


class _ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", _pointer),
        ("tensor_buft_overrides", _pointer),
        ("n_gpu_layers", _i32),
        ("split_mode", _i32),
        ("load_mode", _i32),
        ("lazy_mode", _i32),
        ("main_gpu", _i32),
        ("tensor_split", _pointer),
        ("progress_callback", _pointer),
        ("progress_callback_user_data", _pointer),
        ("kv_overrides", _pointer),
        ("vocab_only", _bool),
        ("check_tensors", _bool),
        ("use_extra_bufts", _bool),
        ("no_host", _bool),
        ("no_alloc", _bool),
        ("load_mtp", _bool),
    )


class _ContextParams(ctypes.Structure):
    _fields_ = (
        *((name, _u32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, _u32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, _i32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, _i32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, _float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, _float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", _u32),
        ("defrag_thold", _float),
        ("cb_eval", _pointer),
        ("cb_eval_user_data", _pointer),
        ("type_k", _i32),
        ("type_v", _i32),
        ("moe_cache_size", ctypes.c_size_t),
        ("abort_callback", _pointer),
        ("abort_callback_data", _pointer),
        *((name, _bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", _pointer),
        ("n_samplers", ctypes.c_size_t),
        ("ctx_other", _pointer),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", _i32),
        ("token", ctypes.POINTER(_i32)),
        ("embd", _pointer),
        ("pos", ctypes.POINTER(_i32)),
        ("n_seq_id", ctypes.POINTER(_i32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(_i32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (_pointer, [ctypes.c_char_p, _ModelParams]),
    "llama_model_free": (None, [_pointer]),
    "llama_model_get_vocab": (_pointer, [_pointer]),
    "llama_model_n_swa": (_i32, [_pointer]),
    "llama_model_chat_template": (ctypes.c_char_p, [_pointer, ctypes.c_char_p]),
    "llama_vocab_n_tokens": (_i32, [_pointer]),
    "llama_vocab_bos": (_i32, [_pointer]),
    "llama_vocab_eos": (_i32, [_pointer]),
    "llama_vocab_eot": (_i32, [_pointer]),
    "llama_vocab_pad": (_i32, [_pointer]),
    "llama_vocab_get_add_bos": (_bool, [_pointer]),
    "llama_vocab_is_control": (_bool, [_pointer, _i32]),
    "llama_vocab_is_eog": (_bool, [_pointer, _i32]),
    "llama_tokenize": (_i32, [_pointer, ctypes.c_char_p, _i32, ctypes.POINTER(_i32), _i32, _bool, _bool]),
    "llama_init_from_model": (_pointer, [_pointer, _ContextParams]),
    "llama_free": (None, [_pointer]),
    "llama_batch_init": (_Batch, [_i32, _i32, _i32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (_i32, [_pointer, _Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(_float), [_pointer, _i32]),
    "llama_adapter_lora_init": (_pointer, [_pointer, ctypes.c_char_p]),
    "llama_set_adapters_lora": (_i32, [_pointer, ctypes.POINTER(_pointer), ctypes.c_size_t, ctypes.POINTER(_float)]),
}
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _pointer)(lambda level, text, data: None)


@functools.cache
def library() -> Any:
    """Return llama.cpp's library.

    Raises:
        StageError: xllamacpp is not installed, or has structures of another form.
    """
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise StageError("xllamacpp must be installed. Received: no such package. Install requirements-readers.txt.")
    lib = ctypes.CDLL(str(next(Path(found.origin).parent.glob("*.so"))))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set.argtypes = [type(_SILENT), _pointer]
    lib.llama_log_set(_SILENT, None)
    lib.llama_backend_init()
    context, model = lib.llama_context_default_params(), lib.llama_model_default_params()
    known = (
        context.n_ctx,
        context.n_batch,
        context.type_k,
        context.defrag_thold,
        context.offload_kqv,
        context.swa_full,
    )
    if known != (512, 2048, 1, -1.0, True, True) or (model.n_gpu_layers, model.use_extra_bufts) != (-1, True):
        raise StageError(
            f"The structures of llama.cpp must be those of the pinned xllamacpp. Received: defaults {known}. Install "
            "requirements-readers.txt."
        )
    return lib


@contextmanager
def opened(path: Path, *, vocabulary_only: bool = False) -> Iterator[LlamaModel]:
    """Yield a GGUF file as llama.cpp reads it.

    Args:
        path: of the file.
        vocabulary_only: no weights, which is enough for token ids.

    Raises:
        StageError: llama.cpp is not there, or does not load the file.
    """
    lib = library()
    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.vocab_only = 0, vocabulary_only
    handle = lib.llama_model_load_from_file(str(path).encode(), params)
    _need(handle, f"llama.cpp must load {path}")
    try:
        yield LlamaModel(lib, handle)
    finally:
        lib.llama_model_free(handle)


def _need(done: Any, what: str) -> None:
    """Raise a StageError unless a call of the library returned what it does on success."""
    if not done:
        raise StageError(f"{what}. Received: a failure, of which the library says no more.")


class LlamaModel:
    """A model in llama.cpp."""

    def __init__(self, lib: Any, handle: int) -> None:
        """Take the library and the model's handle."""
        self._lib, self._handle = lib, handle
        self._vocabulary = lib.llama_model_get_vocab(handle)

    def special(self) -> dict[str, int]:
        """Return the ids of the special tokens; -1 where there is none."""
        names = ("bos", "eos", "eot", "pad")
        return {name: getattr(self._lib, f"llama_vocab_{name}")(self._vocabulary) for name in names}

    def is_control(self, token: int) -> bool:
        """Return whether a token is of the type control."""
        return self._lib.llama_vocab_is_control(self._vocabulary, token)

    def ends_generation(self, token: int) -> bool:
        """Return whether llama.cpp stops at a token."""
        return self._lib.llama_vocab_is_eog(self._vocabulary, token)

    def chat_template(self) -> str | None:
        """Return the chat template in the file."""
        found = self._lib.llama_model_chat_template(self._handle, None)
        return found and found.decode()

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Return the token ids of a text, with BOS if `add_special`; control tokens are found if `parse_special`."""
        content = text.encode()
        room = (_i32 * (len(content) + 2))()
        flags = (add_special, parse_special)
        count = self._lib.llama_tokenize(self._vocabulary, content, len(content), room, len(room), *flags)
        _need(count >= 0, "llama.cpp must split the text into fewer tokens than bytes")
        return list(room[:count])

    def logits(self, ids: list[int], adapter: Path | None = None, last: int | None = None) -> np.ndarray:
        """Return the logits after each token, keys and values kept in float32.

        Args:
            ids: at least one token.
            adapter: a GGUF adapter to put on the model.
            last: only of this many tokens at the end; None for all.

        Returns:
            float32 (tokens, vocabulary).

        Raises:
            StageError: llama.cpp does not load the adapter, or has no memory for the text.
        """
        lib, first = self._lib, len(ids) - (last or len(ids))
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(64, len(ids))
        params.n_threads = params.n_threads_batch = THREADS
        params.type_k = params.type_v = F32
        params.flash_attn_type = 0
        context = lib.llama_init_from_model(self._handle, params)
        _need(context, f"llama.cpp must have memory for {len(ids)} tokens")
        batch = lib.llama_batch_init(len(ids), 0, 1)
        try:
            if adapter:
                lora = lib.llama_adapter_lora_init(self._handle, str(adapter).encode())
                _need(lora, f"llama.cpp must load {adapter} on the model")
                done = lib.llama_set_adapters_lora(context, (_pointer * 1)(lora), 1, (_float * 1)(1.0))
                _need(done == 0, f"llama.cpp must put {adapter} on the model")
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids):
                batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
                batch.seq_id[place][0], batch.logits[place] = 0, place >= first
            _need(lib.llama_decode(context, batch) == 0, f"llama.cpp must read {len(ids)} tokens")
            width = (lib.llama_vocab_n_tokens(self._vocabulary),)
            rows = (lib.llama_get_logits_ith(context, place) for place in range(first, len(ids)))
            return np.stack([np.ctypeslib.as_array(row, width).copy() for row in rows])
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(context)
