"""The memory bank: what it keeps, what it shows, and that training and rollouts are shown the same."""

import pytest
import torch

from worldline.worldmodels.memory import MemoryBank, MemoryConfig, choose, frame_content, recall, recall_in_training

NOW = torch.tensor([40])


def bank_of(poses: list[float], frames: list[int], capacity: int | None = None) -> MemoryBank:
    capacity = capacity or len(poses)
    bank = MemoryBank.empty(1, capacity, 1, {"top": torch.zeros(1, 1)})
    for pose, frame in zip(poses, frames):
        one = torch.tensor([[pose]])
        bank = bank.push(one, torch.tensor([frame]), {"top": 10 * one}, torch.tensor([True]))
    return bank


def shown(bank: MemoryBank, query: float, now: torch.Tensor = NOW, window: int = 8, **config) -> list[int]:
    places, valid = choose(
        bank, torch.tensor([[query]]), now, MemoryConfig(capacity=bank.frames.shape[1], **config), window
    )
    return [int(bank.frames[0, p]) for p, v in zip(places[0], valid[0]) if v]


def test_the_frames_nearest_by_pose_are_shown_however_old_but_none_that_the_cache_still_holds():
    bank = bank_of([0.5, 0.1, 0.9, 0.52, 0.51], [2, 10, 20, 30, 35])
    assert shown(bank, 0.5, nearest=2, gap=1) == [2, 30]  # 35 is within the window
    assert shown(bank, 0.9, nearest=1) == [20]
    assert shown(bank, 0.5, now=torch.tensor([9]), nearest=2) == []  # the only frame before is 7 old


def test_frames_shown_are_apart_from_each_other():
    bank = bank_of([0.5, 0.5, 0.5, 0.8], [2, 3, 4, 20])
    assert shown(bank, 0.5, nearest=2, gap=3) == [2, 20]
    assert shown(bank, 0.5, nearest=2, gap=1) == [2, 3]


def test_recent_frames_are_strided_behind_the_window_and_not_shown_twice():
    bank = bank_of([0.1] * 30, list(range(30)))
    assert shown(bank, 0.1, recent=3, stride=5) == [29, 27, 22]  # asked for 32, 27, 22: 29 is the last there is
    assert shown(bank, 0.1, now=torch.tensor([30]), recent=3, stride=5) == [22, 17, 12]
    both = shown(bank, 0.1, now=torch.tensor([30]), recent=2, stride=5, nearest=2, gap=1)
    assert both[:2] == [22, 17] and len(set(both)) == 4


def test_a_full_bank_gives_up_the_older_of_the_two_frames_most_alike():
    bank = bank_of([0.0, 0.5, 0.51, 0.9, 0.2], [0, 1, 2, 3, 4], capacity=4)
    assert sorted(bank.frames[0].tolist()) == [0, 2, 3, 4]
    assert sorted(bank.content["top"][0, :, 0].tolist()) == pytest.approx([0.0, 2.0, 5.1, 9.0])


def test_rows_are_kept_apart_forked_and_reset():
    a, b = bank_of([0.1, 0.2], [1, 2]), bank_of([0.7, 0.8], [5, 6])
    joined = MemoryBank(
        poses=torch.cat([a.poses, b.poses]),
        frames=torch.cat([a.frames, b.frames]),
        content={"top": torch.cat([a.content["top"], b.content["top"]])},
    )
    forked = joined.index(torch.tensor([1, 0, 1]))
    assert forked.frames.tolist() == [[5, 6], [1, 2], [5, 6]]
    mixed = joined.where(torch.tensor([True, False]), joined.index(torch.tensor([1, 1])))
    assert mixed.frames.tolist() == [[5, 6], [5, 6]]
    skipped = joined.push(
        torch.zeros(2, 1), torch.tensor([9, 9]), {"top": torch.zeros(2, 1)}, torch.tensor([False, True])
    )
    assert skipped.frames[0].tolist() == [1, 2] and 9 in skipped.frames[1].tolist()


@pytest.mark.parametrize("every", [1, 3])
def test_training_is_shown_what_a_rollout_is_shown(every):
    """Rows with beginnings of different lengths; a bank that overflows; another order of events than in training."""
    config, window, e, targets = MemoryConfig(start=True, recent=1, nearest=2, gap=2, capacity=6, every=every), 3, 20, 5
    generator = torch.Generator().manual_seed(0)
    poses, length = torch.rand(4, e, 2, generator=generator), torch.tensor([20, 13, 8, 6])
    latents = {"top": torch.rand(4, e, 1, 2, 2, generator=generator)}
    seen = {"top": torch.rand(4, e, generator=generator) > 0.3}
    query, level = torch.rand(4, targets, 2, generator=generator), torch.rand(4, e, generator=generator)
    found = recall_in_training(latents, seen, poses, level, length, query, config, window)
    some = 0
    for row in range(4):
        first = e - int(length[row])

        def content_of(row: int, at: int) -> dict:
            one = slice(row, row + 1)
            return frame_content({"top": latents["top"][one, at]}, {"top": seen["top"][one, at]}, level[one, at])

        bank = MemoryBank.empty(1, 6, 2, content_of(0, 0))
        for number in range(int(length[row])):
            at, target = first + number, first + number - (e - targets)
            if target >= 0:
                expected = recall(bank, query[row : row + 1, target], torch.tensor([number]), config, window)
                held = expected.valid[0, 0]
                assert torch.equal(found.valid[row, target], held)
                for name in ("pose", "age", "level"):
                    assert torch.equal(getattr(found, name)[row, target][held], getattr(expected, name)[0, 0][held])
                for shown, wanted in ((found.latents, expected.latents), (found.seen, expected.seen)):
                    assert torch.equal(shown["top"][row, target][held], wanted["top"][0, 0][held])
                some += int(held.sum())
            kept = torch.tensor([number % every == 0])
            bank = bank.push(poses[row : row + 1, at], torch.tensor([number]), content_of(row, at), kept)
    assert some > 20


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match=r"capacity of at least start \+ recent \+ nearest = 9"):
        MemoryConfig(recent=5, nearest=4, capacity=8)
    with pytest.raises(ValueError, match="gap and every of at least 1"):
        MemoryConfig(nearest=1, every=0)
