"What Quarto runs first when `nbdev_docs` or `nbdev_preview` calls it: our site is made by another tool"
import sys
sys.exit('Quarto does not build this site. Type: python tools/build_docs.py (with --serve to see it while you write)')
