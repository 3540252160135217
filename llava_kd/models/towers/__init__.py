"""Vision towers of every library, and where their visual tokens lie."""
