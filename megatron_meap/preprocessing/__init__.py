"""From text to Megatron datasets: fast, in bounded memory, all or nothing.

The modules, in the order in which a document passes through them:

- `inputs`, `sources`, `readers`, `recognition`: find the input files, recognise their format, split them into blocks;
- `documents`: parses the documents of a block;
- `blocks`: encodes a block, with the encoder that `tokenization` chose;
- `workers`: processes that encode blocks and return them in order; if one dies, the job stops;
- `outputs`, `writer`, `index`: `.bin` and `.idx`, under temporary names until they are complete;
- `manifest`: what a dataset was made from, and the check that it fits a training run;
- `pipeline`: all of these together (`preprocess`), with resuming (`journal`) and `progress`.

Separate from these: `merge`, `statistics` (verify a dataset), `corpus` and `tokenizer_training`.
"""
