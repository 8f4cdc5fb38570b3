"""One thread a test process: small tensors gain nothing from more, and threads that wait for a busy core cost seconds."""

import torch

torch.set_num_threads(1)
