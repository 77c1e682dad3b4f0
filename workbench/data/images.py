"""Loaders of the image data sets that have a card."""

from __future__ import annotations

import importlib.util
import io
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workbench.data.cards import data_folder
from workbench.data.splits import Arrays, Splits
from workbench.errors import DataError

PATIENCE = 15.0
"""Seconds of silence after which a download is given up."""


def digits() -> Splits:
    """scikit-learn's 1,797 handwritten digits, scaled from 0…16 to 0…255; every fifth is held out for evaluation.

    Returns:
        Splits of uint8 images [N, 1, 8, 8] and int64 labels.
    """
    # Its file, not its function: importing scikit-learn takes every process of a run longer than all else of the data.
    (folder,) = importlib.util.find_spec("sklearn").submodule_search_locations  # type: ignore[union-attr,misc]
    table = np.loadtxt(Path(folder) / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    x = torch.from_numpy(np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
    y = torch.from_numpy(table[:, -1].astype(np.int64))
    held_out = torch.arange(len(y)) % 5 == 0
    return Splits(Arrays(x[~held_out], y[~held_out]), Arrays(x[held_out], y[held_out]))


def cifar10() -> Splits:
    """CIFAR-10 from ``cifar10/{train,test}.parquet`` below the data folder, else by torchvision's download.

    Returns:
        Splits of uint8 images [N, 3, 32, 32] and int64 labels.

    Raises:
        DataError: neither the files nor a download can be had, or an image is corrupt.
    """
    folder = data_folder() / "cifar10"
    files = [folder / "train.parquet", folder / "test.parquet"]
    if all(file.is_file() for file in files):
        return Splits(read_image_parquet(files[0]), read_image_parquet(files[1]))
    return Splits(_cifar10_by_torchvision(folder, True), _cifar10_by_torchvision(folder, False))


def read_image_parquet(file: Path) -> Arrays:
    """Images of one size from Parquet columns ``image`` (encoded bytes, or a struct with ``bytes``) and ``label``.

    Raises:
        DataError: a column is missing, or an image cannot be decoded or differs in size; the row is named.
    """
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except Exception as error:
        raise DataError(f"{file} is not a readable Parquet file: {error}.", "Fetch it again.") from error
    missing = {"image", "label"} - set(table.column_names)
    if missing:
        raise DataError(f"{file} has no column {' or '.join(sorted(missing))}; it has {', '.join(table.column_names)}.")
    encoded = table.column("image").to_pylist()
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        images = list(pool.map(lambda pair: _decode(pair[1], f"{file}, row {pair[0]}"), enumerate(encoded), chunksize=512))
    for row, image in enumerate(images):
        if image.shape != images[0].shape:
            raise DataError(
                f"{file}, row {row}: the image is {image.shape}, the first is {images[0].shape}.", "Resize them to one size."
            )
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Arrays(x, torch.tensor(table.column("label").to_numpy().astype(np.int64)))


def _decode(value: Any, where: str) -> np.ndarray[Any, Any]:
    from PIL import Image

    content = value["bytes"] if isinstance(value, dict) else value
    try:
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except Exception as error:
        raise DataError(f"{where}: the image cannot be decoded ({error}).", "Remove the row, or fetch the file again.") from error


def _cifar10_by_torchvision(folder: Path, train: bool) -> Arrays:
    from torchvision.datasets import CIFAR10

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        source = CIFAR10(str(folder), train=train, download=True)
    except Exception as error:
        raise DataError(
            f"CIFAR-10 is not below {folder} and cannot be downloaded: {error}.",
            "Set WORKBENCH_DATA to the folder that holds cifar10/train.parquet and cifar10/test.parquet.",
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return Arrays(torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(source.targets))
