"""Drop-in modules and ResNet blocks of fused functions, with the parameters and state_dict keys of plain PyTorch."""

from resnet_fused.nn.blocks import BasicBlock, Bottleneck
from resnet_fused.nn.modules import BatchNormAct2d, ConvBNAct2d, Stem
from resnet_fused.nn.sync import SyncBatchNormAct2d

__all__ = ["BasicBlock", "BatchNormAct2d", "Bottleneck", "ConvBNAct2d", "Stem", "SyncBatchNormAct2d"]
