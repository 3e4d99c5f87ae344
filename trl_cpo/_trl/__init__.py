"""The seam: everything that this package knows about the inside of TRL and transformers.

upstream       which versions, and which of their methods and private attributes it rests on
loss           DPOTrainer's loss with the reference's gap moved to a target, observed from outside
models         where models came from, and what the reference is
datasets       how pairs are tokenized and loaded
training_loop  what the training loop counts, and where it saves
"""
