"""What most people write first: FastAPI around `learn.predict`. Usage: naive.py LEARNER PORT WORKERS"""

import sys
import warnings

warnings.simplefilter("ignore")
import uvicorn  # noqa: E402
from fastai.learner import load_learner  # noqa: E402
from fastapi import FastAPI, UploadFile  # noqa: E402

learn = load_learner(sys.argv[1])
app = FastAPI()


@app.post("/predict")
async def predict(file: UploadFile) -> dict:
    with learn.no_bar():
        label, _, probabilities = learn.predict(await file.read())
    return {
        "label": str(label),
        "probabilities": dict(zip(learn.dls.vocab, map(float, probabilities), strict=True)),
    }


if __name__ == "__main__":
    uvicorn.run("naive:app", port=int(sys.argv[2]), log_level="warning", workers=int(sys.argv[3]))
