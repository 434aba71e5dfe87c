"""From pairs of slices to a verdict. Pure: values in, values out."""
