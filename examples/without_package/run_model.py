"""An exported model with the compiled operator, in Python with nothing but onnxruntime and NumPy.

Usage: python run_model.py LIBRARY MODEL
"""

import sys

import numpy as np
import onnxruntime

# One methane molecule, C and four H in Å: a tetrahedron with the first bond stretched by a tenth.
POSITIONS = [[0, 0, 0], [0.69, 0.69, 0.69], [0.63, -0.63, -0.63], [-0.63, 0.63, -0.63], [-0.63, -0.63, 0.63]]

library, model = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
positions = np.array([POSITIONS], np.float32)
(energies,) = session.run(None, {session.get_inputs()[0].name: positions})
print(f"{energies[0]:.6f} eV")
