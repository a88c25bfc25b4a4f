"""How each format is used, for its model card."""

from __future__ import annotations

from collections.abc import Callable

from stages.core.export.adapter import common_rank, lora_modules
from stages.core.export.formats import Job
from stages.core.export.gguf_folder import ADAPTER, MODEL
from stages.core.export.hugging_face_config import CLASSES, model_type
from stages.core.export.names import public_name
from stages.core.export.peft import VLLM_RANKS, vllm_rank
from stages.core.tokenize.chat import turns_of

LIBRARIES = {"peft": "peft", "huggingface": "transformers", "keras": "keras-hub", "gguf": "gguf"}
"""Hugging Face's `library_name` of each format."""


def usage(name: str, job: Job) -> str:
    """Return how a format is used with this model, as Markdown."""
    return USES[name](job)


def _peft(job: Job) -> str:
    rank, base = common_rank(lora_modules(job.tuned)), public_name(job.tuned.preset.manifest)
    wanted = vllm_rank(rank)
    if wanted:
        serve = f"`vllm serve {base} --enable-lora --max-lora-rank {wanted} --lora-modules tuned=PATH/TO/THIS/FOLDER`"
        vllm = f"vLLM needs `--max-lora-rank {wanted}`: {serve}."
    else:
        vllm = (
            f"vLLM takes no adapter of a rank above {VLLM_RANKS[-1]}: serve the merged model there "
            "(`export.formats: [huggingface]`)."
        )
    fits = {
        "text": f"a text model ({CLASSES[model_type(job.tuned.preset.architecture)]})",
        "vision": "a base with a vision tower (Gemma3ForConditionalGeneration), and no text model alone",
    }[job.settings.base]
    return f"""\
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained("{base}")
    model = PeftModel.from_pretrained(base, "PATH/TO/THIS/FOLDER")

The names of its layers fit {fits}: on another base PEFT warns of missing keys, and vLLM applies nothing in silence.
All layers have one rank, {rank}, padded with zeros, and `lora_alpha` is that rank (the scale is in the weights), so
that readers which know one rank for all layers (vLLM, llama.cpp) are right too.

{vllm}"""


def _hugging_face(job: Job) -> str:
    chat = ""
    if job.chat:
        end = turns_of(job.tokenizer).end
        chat = f" Generation ends at `{end}`; `tokenizer.apply_chat_template` lays out the turns."
    return f"""\
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")
    model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER")

The tokenizer begins each text with `<bos>`, which Gemma needs.{chat} `vllm serve PATH/TO/THIS/FOLDER` serves it."""


def _keras(job: Job) -> str:
    family = job.tuned.preset.architecture.class_name.removesuffix("Backbone")
    ends = f", stop_token_ids={job.ends}" if job.chat else ""
    return f"""\
    import keras_hub

    model = keras_hub.models.{family}CausalLM.from_preset("PATH/TO/THIS/FOLDER")
    model.generate("This movie was", max_length=64{ends})

vLLM on TPUs reads the same folder through keras-hub."""


def _gguf(job: Job) -> str:
    lora = ""
    if job.tuned.lora.rank:
        lora = f"""

`{ADAPTER}` is the adapter alone, for a GGUF file of the base: `llama-server -m BASE.gguf --lora {ADAPTER}`. (Ollama
takes merged models only.)"""
    return f"""\
    llama-server -m {MODEL}
    ollama create NAME -f Modelfile && ollama run NAME

The matrices are of type {job.settings.gguf_type}. A smaller file, with llama.cpp's own program:
`llama-quantize {MODEL} model-q4_k_m.gguf Q4_K_M`.{lora}"""


USES: dict[str, Callable[[Job], str]] = {"peft": _peft, "huggingface": _hugging_face, "keras": _keras, "gguf": _gguf}
