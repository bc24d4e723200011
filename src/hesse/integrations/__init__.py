"""hesse inside other libraries; each file imports its own, and is imported only where that is used."""
