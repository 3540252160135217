from collections.abc import Buffer

def kernels() -> list[str]: ...
def resize(
    kernel: str,
    pixels: Buffer,
    height: int,
    width: int,
    rows_first: Buffer,
    rows_weights: Buffer,
    columns_first: Buffer,
    columns_weights: Buffer,
    out: Buffer,
    /,
) -> None: ...
def look_up(pixels: Buffer, plane: int, table: Buffer, out: Buffer, /) -> None: ...
