"""Models and adapters at the border to transformers and PEFT. Knows no rows and no loops."""
