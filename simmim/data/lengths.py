"""Units of length, as metadata of images name them: those of OME and ImageJ, and of UDUNITS-2, which OME-NGFF prescribes."""

UM_PER = {
    "nm": 1e-3,
    "µm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "\\u00B5m": 1.0,  # as ImageJ writes it
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "angstrom": 1e-4,
    "picometer": 1e-6,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
}
