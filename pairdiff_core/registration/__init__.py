"""Stage 5, deformable registration: deformations, losses, network, optimisation, pairs of any size, and scores."""

from .deformation import Deformation, Velocities, concatenated, integrate, integrate_on, roughness
from .losses import RegistrationLoss, bending_energy, label_maps, pool, registration_loss, squared_gradient
from .network import CorrelationStep, RegistrationNetwork, UNetStep, smallest_side, training_loss
from .optimise import Watch, brings_closer, optimise, refine, refine_network, voxels_near
from .register import Sampling, coarsening, register, sampling, used_as_start
from .scores import Case, Method, evaluate, score, score_landmarks, score_pair, summarise
