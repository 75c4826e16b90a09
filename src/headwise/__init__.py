"""See what every attention head of a trained model does, and change how a model attends.

Importing headwise imports neither torch nor transformers: the areas (``headwise.attend``,
``headwise.heads``, ...) and the public functions of ``headwise.api`` arrive on first use.
"""

from headwise._lazy import top_level

__version__ = "0.1.0"

__getattr__, __dir__ = top_level(
    __name__,
    __path__,
    api="api",
    also={"catalogue": "headwise.papers.recorded", "reproduce": "headwise.papers.running"},
    always=["__version__"],
)
