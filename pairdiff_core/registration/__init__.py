"""Stage 5, deformable registration: deformations, losses, the network, optimisation, and pairs of any size."""

from .deformation import Deformation, Velocities, concatenated, integrate
from .losses import RegistrationLoss, bending_energy, label_maps, pool, registration_loss, squared_gradient
from .network import RegistrationNetwork, VelocityStep, training_loss
from .optimise import optimise, refine, voxels_near
from .register import Sampling, coarsening, register, sampling
