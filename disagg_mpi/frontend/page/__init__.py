"""The page at ``/``: what it is told (Python), and what it is (HTML, CSS, JavaScript modules)."""
