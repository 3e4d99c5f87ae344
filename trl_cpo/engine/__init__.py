"""DPOTrainer with exact resume, packing and guards: an engine that knows no constraint."""
