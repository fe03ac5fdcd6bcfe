"""Ordinary augmentation under the objectives: T_a x in the place of x."""
import pytest
import torch

import hssl
import train
from helpers import log_of, train_here
from kill_and_resume import compare
from losses import multi_view_nt_xent, nt_xent


def blob(batch):
    """An image of 28 x 28, one bright square near its middle, `batch` times."""
    x = torch.zeros(batch, 2, 28, 28)
    x[:, :, 10:18, 12:16] = 1
    return x


def test_each_image_is_augmented_in_its_own_way_and_by_the_generator_alone():
    x, other = blob(6).double(), torch.Generator().manual_seed(1)
    drawn = [hssl.augment(x, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*drawn) and drawn[0].shape == x.shape and drawn[0].dtype == x.dtype
    assert not torch.equal(drawn[0], hssl.augment(x, other))
    assert all((drawn[0][i] - drawn[0][k]).abs().max() > 0.5 for i in range(6) for k in range(i))
    clean = drawn[0].mean(1)                                                   # channels move alike, noise does not
    assert (drawn[0][:, 0] - clean).std((1, 2)).max() < 0.3


def test_augmented_images_still_show_what_they_showed(monkeypatch):
    """Without noise and bends: areas from e^-0.44 to e^0.44 times the square's, centres moved by up to 0.15 half sides
    and what turning and sizing about the image's centre adds."""
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: torch.zeros(*shape))
    x = hssl.augment(blob(500), torch.Generator().manual_seed(0))[:, 0]
    mass, place = x.sum((1, 2)), torch.arange(28.0)
    rows, columns = (x.sum(2) @ place) / mass, (x.sum(1) @ place) / mass
    assert 32 * 0.6 < mass.min() < 32 * 0.75 and 32 * 1.3 < mass.max() < 32 * 1.65
    assert (rows - 13.5).abs().max() < 4 and rows.std() > 0.5 and (columns - 13.5).abs().max() < 4


@pytest.mark.parametrize("name", ("a_ssl_loss", "h_ssl_loss"))
def test_without_augmentation_nothing_changes(name, monkeypatch):
    """With T_a the identity one pass is the plain loss; two give all views of an image to the objective at once."""
    monkeypatch.setattr(hssl, "augment", lambda x, generator: x)
    plain, group = getattr(hssl, name), hssl.Rotation(4)
    torch.manual_seed(0)
    x, g1, g2 = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 3, 0, 2, 2])
    f = lambda x: torch.stack([x.rot90(-k, (2, 3)) for k in range(4)], 2).cumsum(3)
    h = lambda view: view.flatten(1)[:, :7]
    expected = plain(f, h, nt_xent, group, x, g1, g2)
    assert hssl.augmented(plain)(f, h, nt_xent, group, x, g1, g2) == expected
    views = []
    plain(f, h, lambda *given: views.extend(given), group, x, g1, g2)
    both = hssl.augmented(plain, 2)(f, h, lambda *given: given, group, x, g1, g2)
    for got, right in zip(both, (views[0], views[0], views[1], views[1]), strict=True):
        torch.testing.assert_close(got, right)
    assert multi_view_nt_xent(*both) > 0


def test_passes_and_processes_draw_their_own(monkeypatch):
    """The encoder sees another T_a x in each pass, and on each process; the random state decides which."""
    seen, x, g = [], blob(3), torch.zeros(3, dtype=torch.long)

    def f(x):
        seen.append(x)
        return x[:, :, None]
    for rank in (0, 0, 1):
        torch.manual_seed(0)
        loss = hssl.augmented(hssl.h_ssl_loss, 2, rank)
        loss(f, lambda view: view.flatten(1), lambda *h: 0, hssl.Rotation(1), x, g, g)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert len(seen[0]) == 6 and not torch.allclose(seen[0][:3], seen[0][3:], atol=0.1)


def test_byol_s_target_sees_the_image_that_the_online_network_sees(few_glyphs, tmp_path, monkeypatch):
    """The same T_a x within a step, another one in the next."""
    seen, augment = [], hssl.augment
    monkeypatch.setattr(hssl, "augment", lambda *given: seen.append(augment(*given)) or seen[-1])
    train_here(tmp_path, "--augment", "1", "--objective", "byol")
    assert len(seen) == 12 and all(torch.equal(*pair) for pair in zip(seen[::2], seen[1::2]))
    assert not torch.equal(seen[0], seen[2])


def test_half_precision_does_not_move_pixels():
    seen, x, g = [], blob(3), torch.zeros(3, dtype=torch.long)
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled):
            hssl.augmented(hssl.h_ssl_loss)(lambda x: seen.append(x) or x[:, :, None], lambda view: view.flatten(1),
                                            lambda *h: 0, hssl.Rotation(1), x, g, g)
    assert torch.equal(*seen)


def test_a_resumed_run_draws_the_same(few_glyphs, tmp_path, monkeypatch):
    """Stopped within an epoch, it ends as the run that was left alone, bit for bit."""
    flags, calls = ["--augment", "2", "--grid", "2"], []
    train_here(tmp_path / "straight", *flags)
    loss = train.multi_view_nt_xent

    def interrupted(*views, temperature):
        calls.append(len(views))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss(*views, temperature=temperature)
    monkeypatch.setattr(train, "multi_view_nt_xent", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_here(tmp_path / "run", *flags)
    calls.append(0)
    train_here(tmp_path / "run", *flags, "--resume")
    assert compare(tmp_path / "run", tmp_path / "straight") == []
    assert set(calls) == {4, 0}


def test_a_ssl_may_see_the_whole_map(few_glyphs, tmp_path):
    """SimCLR: with a window as large as the map only T_a makes two views of an image differ."""
    whole = ["--group", "translation", "--base-space", "7"]
    train_here(tmp_path / "simclr", *whole, "--method", "a-ssl", "--augment", "1")
    assert len(log_of(tmp_path / "simclr")) == 6
    with pytest.raises(SystemExit):
        train_here(tmp_path / "plain", *whole, "--method", "a-ssl")
    with pytest.raises(SystemExit):
        train_here(tmp_path / "h-ssl", *whole, "--augment", "1")
