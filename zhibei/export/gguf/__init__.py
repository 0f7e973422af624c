"""Models as GGUF files for llama.cpp, Ollama and what is built on them. `export.py` is the one thing to call."""
