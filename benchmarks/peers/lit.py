"""LitServe as its documentation recommends for throughput: tensors decoded apart, batches of 8. Usage: lit.py LEARNER PORT WORKERS"""

import sys
import warnings

warnings.simplefilter("ignore")
import litserve as ls  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from fastai.learner import load_learner  # noqa: E402
from PIL import Image  # noqa: E402

SIZE = 224
MEAN, STD = (np.float32(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class Photographs(ls.LitAPI):
    def setup(self, device):
        learn = load_learner(sys.argv[1])
        self.model, self.vocab = learn.model.eval(), list(learn.dls.vocab)

    def decode_request(self, request):
        image = Image.open(request["file"].file).convert("RGB").resize((SIZE, SIZE), Image.BILINEAR)
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
        return torch.from_numpy((pixels - MEAN) / STD)

    def batch(self, inputs):
        return torch.stack(inputs)

    def predict(self, batch):
        with torch.inference_mode():
            return self.model(batch).softmax(1)

    def encode_response(self, output):
        odds = dict(zip(self.vocab, output.tolist(), strict=True))
        return {"label": max(odds, key=odds.get), "probabilities": odds}


if __name__ == "__main__":
    api = Photographs(max_batch_size=8, batch_timeout=0.005)
    server = ls.LitServer(api, accelerator="cpu", timeout=60, workers_per_device=int(sys.argv[3]))
    server.run(port=int(sys.argv[2]), log_level="error", generate_client_file=False)
