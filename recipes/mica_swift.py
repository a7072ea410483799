"""MiCA in ms-swift's continued pretraining: python mica_swift.py OPTIONS, in place of swift pt OPTIONS"""

import mica.fast  # before swift, which wraps functions of PEFT: the wrappers must be around this package's
import swift.tuners.peft  # noqa: F401  it wraps them here
from peft.tuners.lora import LoraModel
from swift.pipelines.train.pretrain import SwiftPretrain

# swift's constructor gives every lora_A and lora_B a forward of its own, which moves x to their device. With
# that, PEFT's code would run. Nothing is lost here: PEFT has put both on the device of their layer
LoraModel.__init__ = LoraModel.__init_origin__

if __name__ == "__main__":
    training = SwiftPretrain()
    training.main()
    print(mica.fast.explain(training.model))  # path kernel, reference or operators (CPU): this backend
