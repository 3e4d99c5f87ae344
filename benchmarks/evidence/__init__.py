"""Where a constraint pays, where it does not, and at what price: experiments that can be repeated. See docs/evidence.md.

text      turns of dialogues, parted by content into training, validation and test; a tokenizer learnt from them
small     a small language model, and how it learns text and answers
arms      the trainings that are compared: the package's forms, and TRL's own losses
measures  KL, decisions, rewards: of the policy's own answers
decisions, sampled, misaligned   the experiments with it
larger, real                     the experiments with SmolLM2-135M
bench     the experiments by name, their sizes, the texts and models that they share
runs      runs side by side, and their records
tables    every table of the docs, from the records alone
"""
