from lmkan_deploy.cli import main

main()
