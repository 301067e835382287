"""From text to Megatron datasets: fast, in bounded memory, all or nothing.

The rooms, in the order in which a document walks through them:

- `readers`: finds the input files, recognises what they are, cuts them into blocks;
- `documents`: takes the documents out of a block;
- `reference`, `encoders`: the tokenizer that training uses, and the fastest library that gives the same ids;
- `workers`: processes that encode blocks, in order, and whose death is noticed;
- `writer`: `.bin` and `.idx` under temporary names until they are complete;
- `manifest`: what a dataset is made of, and the check that it fits a training run;
- `pipeline`: all of it together (`preprocess`), with resuming and progress.

Beside them: `merge`, `inspection` (verify a dataset, statistics) and `tokenizer_training`.
"""
