"""A preset on disk, in its three formats (keras-hub, Hugging Face safetensors, GGUF): its manifest, architecture,
weights and tokenizer, read as untrusted files.
Imports `records` and `common`.
"""
