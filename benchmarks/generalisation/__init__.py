"""Defaults on trial across small models of other seeds, widths and worlds."""
