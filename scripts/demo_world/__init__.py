"""The demo world: pictures of sums and coloured shapes, and conversations about them."""
