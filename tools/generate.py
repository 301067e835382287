"""Continue a text with a trained model: a Megatron checkpoint of any layout, or a Hugging Face directory."""

import start

if __name__ == "__main__":
    start.run("generate")
