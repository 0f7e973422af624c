"""Words to token ids and back: templates, tokenizers and the mask of what is learned. Knows no files of rows."""
