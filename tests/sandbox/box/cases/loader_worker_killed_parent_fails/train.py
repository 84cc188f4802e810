"""Loses a DataLoader worker to the memory limit and fails, as PyTorch does by itself."""

import sys

import torch
from torch.utils.data import DataLoader, Dataset


class Hoard(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        kept = []
        while True:
            kept.append(bytearray(16 * 2**20))


try:
    for batch in DataLoader(Hoard(), num_workers=1):
        pass
except RuntimeError as error:
    print("worker lost:", error, flush=True)
    raise
