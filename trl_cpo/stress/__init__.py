"""Whether what a run gained holds under prompts that look different from those it was evaluated on."""
