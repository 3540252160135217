"""A student as llama.cpp reads it: a language model and a vision file (`mmproj`), both in GGUF."""
