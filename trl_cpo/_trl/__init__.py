"""The seam: all code that depends on internals of TRL, transformers and PEFT.

upstream       supported versions, and the methods and private attributes relied on
trial          an untested TRL is tried: the self-test, in a process of its own
loss           DPOTrainer's loss at a moved target, observed from outside
models         where a model was loaded from, and which one is the reference
datasets       how pairs are tokenized and loaded
lora_layers    LoRA layers without the casts that autocast takes back
training_loop  the training loop's counters, and where it saves
"""
