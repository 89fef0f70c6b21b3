"""Hugging Face's image-classification pipeline on the artifact as it is, with batches and two workers."""

from __future__ import annotations

import torch
from common import arguments, paths, told
from transformers import pipeline

BATCH = 16

if __name__ == "__main__":
    args = arguments()
    label = pipeline("image-classification", model=str(args.model), device="cpu", dtype=getattr(torch, args.precision), top_k=1)
    ids = label.model.config.label2id
    names, found = paths(args), []
    for answer in label((name for name in names), batch_size=BATCH):
        found.append(int(ids[answer[0]["label"]]))
        if len(found) % BATCH == 0 or len(found) == len(names):
            at = (len(found) - 1) // BATCH * BATCH
            told(args.out, names[at : len(found)], found[at:])
