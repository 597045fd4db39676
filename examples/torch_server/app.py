"""The image server with its model on torch."""

from stagescope import StageMiddleware
from stagescope.examples.image_server.app import create_app
from stagescope.examples.image_server.settings import settings
from stagescope.examples.torch_server.model import Classifier

app = StageMiddleware(create_app(settings(), Classifier), service="torch-server")  # the one line
