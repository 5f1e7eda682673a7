"""One thread for tests: tiny tensors gain nothing from two, and lose much on a busy machine."""

import torch

torch.set_num_threads(1)
