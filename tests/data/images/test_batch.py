"""The documents of a packed sequence are told apart by whether they show an image."""

from __future__ import annotations

import torch

from data.images.batch import BatchImages


def test_a_document_shows_images_before_and_after_its_text():
    # a document ends, a text, a document begins; a text, a document
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1], [0, 1, 2, 3, 0, 1, 2, 3]])
    rows = torch.tensor([[-1, 0, 1, -1, -1, -1, -1, 2], [-1, -1, -1, -1, -1, -1, 0, -1]])
    found = BatchImages(rows, [[], []], 1).documents_with_images(positions)
    assert found.int().tolist() == [[1, 1, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]
