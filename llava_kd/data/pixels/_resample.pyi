from numpy import ndarray

def kernels() -> list[str]: ...
def resize(
    kernel: str,
    pixels: ndarray,
    height: int,
    width: int,
    rows_first: ndarray,
    rows_weights: ndarray,
    columns_first: ndarray,
    columns_weights: ndarray,
    out: ndarray,
    /,
) -> None: ...
def look_up(pixels: ndarray, plane: int, table: ndarray, out: ndarray, /) -> None: ...
